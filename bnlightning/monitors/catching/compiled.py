"""Seeing values inside the graphs that torch.compile makes, where the Python code of a hook is not run but traced.

A hook there leaves a call of an operator in the graph that the compiler cannot look into, and whose body is run with
the graph. A plain attribute tells whether it does so, on which the graph is guarded: there is a second one, without a
trace of the hook, for the steps that nobody looks at.
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
# A graph that CUDA replays would not run Python; so told, inductor leaves the operator out of it (from torch 2.9).
_unsafe: Any = getattr(torch.Tag, "cudagraph_unsafe", None)


_options: dict[str, Any] = {"mutates_args": ("receiver",)} | ({"tags": (_unsafe,)} if _unsafe is not None else {})


@torch.library.custom_op("bnlightning::observe", **_options)
def observe(x: Tensor, receiver: Tensor, index: Tensor, position: int) -> None:
    """Show ``x`` to a receiver when the graph runs.

    That the receiver's number counts as changed keeps the calls, each once and in their order. It and the index are
    tensors, so that modules of the same kind that are compiled one by one share a graph.

    Args:
        x: Any.
        receiver: What :func:`add_receiver` gave.
        index: Number of the module.
        position: Place of ``x`` in what the module returned.
    """
    found = _receivers.get(int(receiver))
    if found is not None:
        with torch.no_grad():
            found[0](int(index), position, x)


@torch.library.custom_op("bnlightning::observe_tap", **_options)
def observe_tap(x: Tensor, receiver: Tensor, name: str, low: float, high: float) -> None:
    """Show ``x`` under a name to a receiver when the graph runs; infinite limits are none."""
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
    """Have them called by :func:`observe` and :func:`observe_tap` with the number that is returned.

    Args:
        receive: Called with index, position and value.
        receive_tap: Called with name, value and limits.
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
