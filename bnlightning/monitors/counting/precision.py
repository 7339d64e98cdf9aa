"""The dtypes of values and of sums. Sums are float64, except on Apple's GPUs."""

import torch
from torch import Tensor


def real_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor on a device that has float64: itself, or a copy on the CPU if it lies on Apple's GPU."""
    return tensor if real_dtype(tensor.device) is torch.float64 else tensor.cpu()


def counted_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which values are counted: that which holds them exactly, float32 or float64.

    Values of float64 and of large integers are counted in float64, except on Apple's GPUs. All others fit float32.
    """
    is_wide = tensor.dtype in _WIDE and real_dtype(tensor.device) is torch.float64
    return torch.float64 if is_wide else torch.float32


_WIDE = frozenset(
    {torch.float64, torch.complex128, torch.int32, torch.int64, torch.uint32, torch.uint64},
)
