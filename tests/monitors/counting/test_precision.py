import torch

from bnlightning.monitors.counting.precision import real_dtype, where_float64_is


def test_sums_are_float64_but_on_the_device_that_has_none():
    assert real_dtype(torch.device("cpu")) is real_dtype(torch.device("cuda")) is torch.float64
    assert real_dtype(torch.device("mps")) is torch.float32


def test_a_tensor_stays_where_float64_is():
    x = torch.ones(2)
    assert where_float64_is(x) is x
