"""How values are seen inside the graphs of torch.compile, where the Python code of a hook is traced and not run.

There, a hook leaves the call of an operator in the graph. The compiler cannot look into that operator, and its body
runs with the graph. A plain attribute tells whether a hook leaves the call, and the graph is guarded on it. Steps that
nobody looks at therefore have a second graph, without any trace of the hook.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Limits = tuple[float, float]
Receiver = Callable[[int, int, Tensor], None]
TapReceiver = Callable[[str, Tensor, Limits | None], None]

_receivers: dict[int, tuple[Receiver, TapReceiver]] = {}
_numbers = itertools.count()
# A graph that CUDA replays does not run Python. With this tag, inductor leaves the operator out of it (from torch 2.9).
_unsafe: Any = getattr(torch.Tag, "cudagraph_unsafe", None)


_options: dict[str, Any] = {"mutates_args": ("receiver",)} | ({"tags": (_unsafe,)} if _unsafe is not None else {})


@torch.library.custom_op("bnlightning::observe", **_options)
def observe(x: Tensor, receiver: Tensor, index: Tensor, position: int) -> None:
    """Show ``x`` to a receiver when the graph runs.

    The receiver's number is declared as changed. This keeps every call, once and in order. The number and the index are
    tensors, so that modules of the same kind that are compiled one by one share a graph.

    Args:
        x: Tensor of any shape and floating dtype.
        receiver: The number that :func:`add_receiver` returned, an int64 tensor without dimensions.
        index: Number of the module, an int64 tensor without dimensions.
        position: Place of ``x`` in what the module returned. -1 if that is ``x`` itself.
    """
    found = _receivers.get(int(receiver))
    if found is not None:
        with torch.no_grad():
            found[0](int(index), position, x)


@torch.library.custom_op("bnlightning::observe_tap", **_options)
def observe_tap(x: Tensor, receiver: Tensor, name: str, low: float, high: float) -> None:
    """Show ``x`` under a name to a receiver when the graph runs. Infinite limits mean that there are none."""
    found = _receivers.get(int(receiver))
    if found is not None:
        with torch.no_grad():
            found[1](name, x, None if low == -math.inf and high == math.inf else (low, high))


@observe.register_fake
def _(x: Tensor, receiver: Tensor, index: Tensor, position: int) -> None:
    return None


@observe_tap.register_fake
def _(x: Tensor, receiver: Tensor, name: str, low: float, high: float) -> None:
    return None


def add_receiver(receive: Receiver, receive_tap: TapReceiver) -> Tensor:
    """Register what :func:`observe` and :func:`observe_tap` call.

    Args:
        receive: Called with index, position and value.
        receive_tap: Called with name, value and limits.

    Returns:
        The number to call them by, an int64 tensor without dimensions.
    """
    number = next(_numbers)
    _receivers[number] = receive, receive_tap
    return torch.tensor(number)


def remove_receiver(number: Tensor) -> None:
    """Undo :func:`add_receiver`."""
    _receivers.pop(int(number), None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or a part of it is compiled, in any of the ways there are."""
    # Private: the way of Lightning, and that of nn.Module.compile.
    return getattr(module, "_compiler_ctx", None) is not None or any(
        type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
