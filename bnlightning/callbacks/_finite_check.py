"""Where the first non-finite value of a training came from."""

import weakref
from typing import Any

import torch
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class FiniteCheck:
    """Finds where the first non-finite value of a forward pass in training came from.

    A value is checked where a module puts it out and, if it is not the output of the module before, where one takes it
    in. In the order of execution the first that is not finite is the origin: nothing before it was.

    Args:
        device: Where the steps found are kept until they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.step: int | None = None
        self.reported = False
        self._device = device
        self._places: dict[str, int] = {}
        self._magnitudes: dict[int, Tensor] = {}
        self._found: Tensor | None = None
        self._previous: weakref.ref[Tensor] | None = None

    def update(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        """Look at one call of a module, in a pass that is checked."""
        # In a chain the input is the output before it, which has been looked at (and may be overwritten by now).
        if self._previous is None or not args or self._previous() is not args[0]:
            # The first module's input is the batch's.
            place = f"before {name}" if self._previous is not None else "input"
            for arg in args:
                if isinstance(arg, Tensor) and arg.is_floating_point() and arg is not output:
                    self._look(place, arg)
        self._look(name, output)
        self._previous = weakref.ref(output)

    def _look(self, place: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        index = self._places.setdefault(place, len(self._places))
        # One pass, and NaN if there is a NaN. The norm of order infinity says the same twenty times slower on a CPU.
        low, high = torch.aminmax(x.detach())
        magnitude = torch.maximum(high, -low)
        before = self._magnitudes.get(index)
        self._magnitudes[index] = magnitude if before is None else torch.maximum(before, magnitude)

    def end_of_step(self) -> None:
        """Keep the step of every place where it is the first; on the device, without waiting for it."""
        step, self.step, self._previous = self.step, None, None
        if step is None or not self._magnitudes:
            return
        # Fit may go on after an evaluation under inference mode, whose tensors nobody may change later.
        with torch.no_grad(), torch.inference_mode(False):
            now = torch.full((len(self._places),), _NEVER, dtype=torch.int64, device=self._device)
            indices = torch.tensor(list(self._magnitudes), device=self._device)
            magnitudes = torch.stack([m.float() for m in self._magnitudes.values()])
            now[indices] = torch.where(magnitudes.isfinite(), _NEVER, step)
            if self._found is not None:
                known = len(self._found)
                now[:known] = torch.minimum(now[:known], self._found)
            self._found = now
        self._magnitudes = {}

    def first(self) -> tuple[int, str] | None:
        """The step and the place, over all ranks; every rank must call it. One answer only, then the check is over."""
        own = None
        if self._found is not None:
            steps = self._found.tolist()
            step = min(steps)
            # The places are in the order of execution.
            own = (step, steps.index(step), list(self._places)[steps.index(step)])
        dist = torch.distributed
        everyone = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        found = min((answer for answer in everyone if answer is not None), default=None)
        if found is None or found[0] == _NEVER:
            return None
        self.reported = True
        return found[0], found[2]
