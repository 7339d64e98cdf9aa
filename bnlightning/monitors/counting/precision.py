"""The dtype of sums: float64, except on Apple's GPUs."""

import torch
from torch import Tensor


def real_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor on a device that has float64: itself, or a copy on the CPU if it lies on Apple's GPU."""
    return tensor if real_dtype(tensor.device) is torch.float64 else tensor.cpu()
