import pytest
import torch

from bnlightning.monitors.counting.precision import counted_dtype, real_dtype, where_float64_is


def test_sums_are_float64_but_on_the_device_that_has_none():
    assert real_dtype(torch.device("cpu")) is real_dtype(torch.device("cuda")) is torch.float64
    assert real_dtype(torch.device("mps")) is torch.float32


def test_a_tensor_stays_where_float64_is():
    x = torch.ones(2)
    assert where_float64_is(x) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.int64, torch.int32])
def test_values_that_float32_cannot_hold_are_counted_in_float64(dtype):
    assert counted_dtype(torch.ones(2, dtype=dtype)) is torch.float64


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool]
)
def test_all_other_values_are_counted_in_float32(dtype):
    assert counted_dtype(torch.ones(2, dtype=dtype)) is torch.float32
