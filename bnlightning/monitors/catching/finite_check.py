"""Checks that find where the first non-finite value of a training came from.

The output of every module that may make a non-finite value is looked at. So is the input of such a module, unless it is
the output that was looked at just before. The loss comes last. The first value in the order of execution that is not
finite is the origin.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bnlightning.monitors.counting.precision import real_dtype

_NEVER = torch.iinfo(torch.int64).max

Found = tuple[int, int, str]
"""The step, the number of places before, and the place: a module, ``before`` or ``after`` one, ``input``, ``loss``."""


class FiniteCheck(Protocol):
    """A check that looks at the forward passes of a training until it finds a non-finite value.

    Attributes:
        is_immediate: Whether :meth:`found` answers without waiting for the device.
    """

    is_immediate: bool

    def begin(self, step: int) -> None:
        """Begin a training step: the forward passes that follow are looked at."""

    def update(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        """Look at one call of a module.

        Args:
            name: Path of the module.
            args: What the module took in.
            output: One floating tensor that it put out.
        """

    def update_sums(self, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Look at the sums of what compiled modules took in and put out.

        Args:
            names: Paths of the modules, in order.
            inputs: The sum over the inputs of each, tensors without dimensions.
            outputs: The sum over the outputs of each, likewise.
        """

    def update_loss(self, loss: Tensor) -> None:
        """Look at the loss, which comes behind all modules."""

    def end(self) -> None:
        """End the training step."""

    def found(self) -> Found | None:
        """What this rank found. ``None`` if every value was finite."""


def make_check(device: torch.device) -> FiniteCheck:
    """The check for values on ``device``."""
    return _ImmediateCheck() if device.type == "cpu" else _DeferredCheck(device)


class _ImmediateCheck:
    """The check on a CPU, where reading a value costs no waiting."""

    is_immediate = True

    def __init__(self) -> None:
        self._step = 0
        self._order = 0
        self._last = ""
        self._found: Found | None = None

    def begin(self, step: int) -> None:
        self._step, self._order = step, 0

    def update(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        order, self._order, self._last = self._order, self._order + 1, name
        # A sum is the cheapest test. It is not finite if a value is not, but also if it overflows: hence the second
        # look.
        if self._found is not None or math.isfinite(output.detach().sum().item()) or _is_finite(output):
            return
        came_in = any(not _is_finite(x) for x in _floating(args) if x is not output)
        place = name if not came_in else f"before {name}" if order else "input"
        self._found = self._step, order, place

    def update_sums(self, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._last = names[-1]
        if self._found is not None:
            return
        finite = torch.stack([*inputs, *outputs]).isfinite().view(2, -1)
        if not finite[1].all():
            order = finite[1].tolist().index(False)
            place = names[order] if finite[0, order] else f"before {names[order]}" if order else "input"
            self._found = self._step, order, place

    def update_loss(self, loss: Tensor) -> None:
        if self._found is None and not (math.isfinite(loss.sum().item()) or _is_finite(loss)):
            self._found = self._step, self._order, _behind(self._last)

    def end(self) -> None:
        pass

    def found(self) -> Found | None:
        return self._found


class _DeferredCheck:
    """The check on a GPU, whose results are read only when a monitor publishes."""

    is_immediate = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._step = 0
        self._last = ""
        self._places: dict[str, int] = {}
        self._sums: dict[int, Tensor] = {}
        self._first: Tensor | None = None
        self._previous: tuple[weakref.ref[Tensor], int] | None = None

    def begin(self, step: int) -> None:
        self._collect()
        self._step, self._previous = step, None

    def update(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        # In a chain the input is the previous output. That has been looked at, unless it was changed since.
        if not (args and isinstance(args[0], Tensor) and self._is_previous(args[0])):
            place = f"before {name}" if self._previous is not None else "input"
            for x in _floating(args):
                if x is not output:
                    self._look(place, x)
        self._look(name, output)
        self._last = name
        self._previous = weakref.ref(output), _version(output)

    def update_sums(self, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for order, (name, total_in, total_out) in enumerate(zip(names, inputs, outputs, strict=True)):
            self._look(f"before {name}" if order else "input", total_in)
            self._look(name, total_out)
        self._last = names[-1]

    def update_loss(self, loss: Tensor) -> None:
        self._look(_behind(self._last), loss)

    def end(self) -> None:
        self._collect()

    def found(self) -> Found | None:
        self._collect()
        if self._first is None:
            return None
        steps = self._first.tolist()
        step = min(steps)
        if step == _NEVER:
            return None
        # The places are in the order of execution.
        order = steps.index(step)
        return step, order, list(self._places)[order]

    def _is_previous(self, x: Tensor) -> bool:
        return self._previous is not None and self._previous[0]() is x and self._previous[1] == _version(x)

    def _look(self, place: str, x: Tensor) -> None:
        index = self._places.setdefault(place, len(self._places))
        # No sum of float32 values overflows in float64. Apple's GPUs have no float64: there the extrema are looked at.
        is_wide = real_dtype(x.device) is torch.float64
        total = x.detach().sum(dtype=torch.float64) if is_wide else torch.stack(torch.aminmax(x)).sum()
        before = self._sums.get(index)
        self._sums[index] = total if before is None else before + total

    def _collect(self) -> None:
        """Keep for every place the first step at which it was not finite, on the device and without waiting for it."""
        if not self._sums:
            return
        # Evaluations run in inference mode, whose tensors could not be changed when the fit goes on.
        with torch.no_grad(), torch.inference_mode(False):
            # Not by indices: bringing them to a GPU would wait for it.
            nothing = torch.zeros((), dtype=next(iter(self._sums.values())).dtype, device=self._device)
            sums = torch.stack([self._sums.get(index, nothing) for index in range(len(self._places))])
            now = torch.where(sums.isfinite(), _NEVER, self._step)
            if self._first is not None:
                known = len(self._first)
                now[:known] = torch.minimum(now[:known], self._first)
            self._first = now
        self._sums = {}


def _behind(name: str) -> str:
    return f"after {name}" if name else "loss"


def _is_finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    low, high = torch.aminmax(x.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _floating(args: tuple[Any, ...]) -> Iterator[Tensor]:
    return (x for x in args if isinstance(x, Tensor) and x.is_floating_point())


def _version(x: Tensor) -> int:
    # Tensors of inference mode have no version. They cannot be changed behind autograd's back either.
    return 0 if x.is_inference() else x._version
