"""What stands for the values of a tensor that is not of torch's own type, or that has more than values."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def plain(x: Tensor) -> Tensor | None:
    """``x`` as a tensor of torch's own type. ``None`` if its values cannot be read in that way.

    Of a distributed tensor it is the part of this rank. Of a tensor with a derivative, as forward-mode differentiation
    has them, it is the value. A type of the user that only stands for its own operations is left aside. Nested tensors
    stay as they are.

    Args:
        x: Any tensor, such as a fake one, or one of a type of the user.
    """
    if type(x) is not Tensor:
        for name in ("to_local", "trigger_wait"):
            x = getattr(x, name)() if hasattr(x, name) else x
        if x.is_nested:
            return x
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            # It answers every operation itself. What it holds, nobody else knows.
            return None
        with torch._C.DisableTorchFunctionSubclass():
            x = x.as_subclass(Tensor)
    value: Tensor = forward_ad.unpack_dual(x).primal
    return value
