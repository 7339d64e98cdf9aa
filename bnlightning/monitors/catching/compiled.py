"""How values are seen inside the graphs of torch.compile, where the Python code of a hook is traced and not run.

There, a hook leaves the call of an operator in the graph. The compiler cannot look into that operator, and its body
runs with the graph. A plain attribute tells whether a hook leaves the call, and the graph is guarded on it. Steps that
nobody looks at therefore have a second graph, without any trace of the hook. So has an exported program.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
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


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)
"""Whether ``torch.export`` traces a program. Always ``False`` before torch 2.7, which cannot tell."""
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


def make_one(device: torch.device) -> Tensor:
    """The one for :func:`copied`."""
    with torch.inference_mode(False):
        return torch.ones((), device=device)


def copied(x: Tensor, one: Tensor | None) -> Tensor:
    """A copy of ``x`` to show to :func:`observe`, in float32 at least.

    Shown the value itself, the compiler would have to write it down, in its own precision. It would split the user's
    own operations there, and their results would differ in the last bits. It does not know that ``one`` is a one.
    """
    assert one is not None
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)) * one


def remove_receiver(number: Tensor) -> None:
    """Undo :func:`add_receiver`."""
    _receivers.pop(int(number), None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, a part of it or one of its methods is compiled, in any of the ways there are."""
    # Private: the way of Lightning, and that of nn.Module.compile.
    return getattr(module, "_compiler_ctx", None) is not None or any(
        type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(map(_is_compiled_function, _attributes(part)))
        for part in module.modules()
    )


def has_compiled() -> bool:
    """Whether ``torch.compile`` has compiled anything in this process, since the last :func:`torch.compiler.reset`."""
    # Private, and not worth an import of torch.compile, which takes a second.
    seen = getattr(sys.modules.get("torch._dynamo.convert_frame"), "input_codes", None)
    return bool(getattr(seen, "seen", ()))


def number_of_compilations() -> int:
    """How often ``torch.compile`` has compiled anything in this process. A graph that is made anew counts again."""
    # Private, but where torch's own tests look.
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return int(counters["frames"]["total"]) if counters else 0


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What is set on a module or on its classes, down to those of torch and Lightning."""
    yield from vars(module).values()
    for kind in type(module).__mro__:
        if not kind.__module__.startswith(("torch.nn.", "lightning.", "pytorch_lightning.")):
            yield from vars(kind).values()


def _is_compiled_function(value: Any) -> bool:
    # Private: what torch.compile makes of a function remembers that function, as does one that it shall not compile.
    own = getattr(value, "__dict__", ()) if callable(value) else ()
    return "_torchdynamo_orig_callable" in own and "_torchdynamo_disable" not in own
