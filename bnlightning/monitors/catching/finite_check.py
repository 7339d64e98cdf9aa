"""Checks that find where the first non-finite value of a training came from.

The output of every module that may make a non-finite value is looked at, and so is what such a module takes in. The
loss comes last, and it decides: an infinity that a softmax takes for a mask does no harm, and neither does a NaN that
nothing follows from. Only a step whose loss is not finite is a fault. Then the first bad value in the order of
execution is its origin, unless the batch or a parameter was bad before.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlightning.compare.names import written
from bnlightning.monitors.catching.contents import UnreadableError, tensors_in, values_of
from bnlightning.monitors.catching.selection import user_path
from bnlightning.monitors.counting.precision import real_dtype

# What is the worst among some values. A mask is made of minus infinities, and so is the logarithm of zeros.
_FINITE, _LOW, _HIGH, _NAN = range(4)
# Steps whose results lie on the device before they are read, where no monitor publishes.
_MAX_PENDING = 1000


class Place(NamedTuple):
    """Where the first non-finite value was.

    Args:
        kind: ``"output"`` or ``"before"`` for the output or the input of a module, ``"first"`` for the input of the
            first module, ``"after"`` for the loss behind a module, ``"loss"`` without any, ``"batch"``,
            ``"parameter"`` or ``"buffer"``.
        path: Path of the module, the parameter or the buffer, or place in the batch.
        batch_idx: Number of the batch, where the batch is the place.

    Example:
        >>> str(Place("before", "net.1")), str(Place("output", "net.1"))
        ('before net.1', 'net.1')
    """

    kind: str
    path: str = ""
    batch_idx: int | None = None

    @property
    def is_of_module(self) -> bool:
        """Whether the path is that of a module."""
        return self.kind in ("output", "before", "first", "after")

    def __str__(self) -> str:
        words = {"output": self.path, "first": f"before {self.path}", "loss": "loss", "batch": f"input{self.path}"}
        return words.get(self.kind, f"{self.kind} {self.path}")


Found = tuple[int, int, Place]
"""The step, the number of calls before, and the place."""


class FiniteCheck(Protocol):
    """A check that looks at the forward passes of a training until it finds a non-finite value.

    Attributes:
        is_immediate: Whether :meth:`found` answers without waiting for the device.
    """

    is_immediate: bool

    def hold(self, module: nn.Module) -> None:
        """Have the parameters and buffers of a network looked at, too."""

    def begin(self, step: int, batch: Any = None, batch_idx: int | None = None) -> None:
        """Begin a training step: the forward passes that follow are looked at.

        Args:
            step: Number of the step.
            batch: What the step is given.
            batch_idx: Number of the batch.
        """

    def update(self, path: str, given: Any, output: Any) -> None:
        """Look at one call of a module.

        Args:
            path: Path of the module.
            given: What the module took in, its data first.
            output: What it put out.
        """

    def update_sums(self, paths: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Look at the sums of what compiled modules took in and put out.

        Args:
            paths: Paths of the modules, in order.
            inputs: The sum over the inputs of each, tensors without dimensions.
            outputs: The sum over the outputs of each, likewise.
        """

    def update_loss(self, loss: Tensor) -> None:
        """Look at a loss, which comes behind all modules that were called so far."""

    def expect_new_parameters(self) -> None:
        """Take note that an optimizer steps: parameters are looked at again."""

    def end(self) -> None:
        """End the training step. If no loss was seen, it is a fault if a parameter or a gradient is bad behind it."""

    def found(self) -> Found | None:
        """What this rank found. ``None`` if nothing was wrong."""


def make_check(device: torch.device) -> FiniteCheck:
    """The check for values on ``device``."""
    return _ImmediateCheck(device) if device.type == "cpu" else _DeferredCheck(device)


class _Trial:
    """One step, in which what was seen is told in order, and the verdict on it.

    Args:
        step: Number of the step.
        usual: The bad values that earlier steps had although their loss was finite, and how bad they were.
        batch_idx: Number of the batch.
    """

    def __init__(self, step: int, usual: dict[Place, int], batch_idx: int | None = None) -> None:
        self.step = step
        self.usual = usual
        self.batch_idx = batch_idx
        self.held: Mapping[Place, int] = {}
        self.batch: Mapping[str, int] | None = None
        self.suspect: Place | None = None
        self.verdict: Found | None = None
        self.saw_loss = False
        self._state = self._origin = self._last_state = _FINITE
        self._order = 0
        self._called: list[str] = []
        self._bad: dict[Place, int] = {}

    def call_finite(self, path: str) -> None:
        """Tell of a call whose output was finite."""
        self._called.append(path)
        self._last_state = _FINITE
        # Masks and scores of minus infinity end here, in a softmax.
        if self._state == _LOW:
            self.suspect, self._state = None, _FINITE

    def call(self, path: str, out: int, first: int = _FINITE, others: int = _FINITE) -> None:
        """Tell of a call: how bad the output was, the first tensor that was given, and the others."""
        if out == _FINITE:
            self.call_finite(path)
            return
        order, self._last_state = len(self._called), out
        self._called.append(path)
        # Behind the data come masks: they may hold minus infinities.
        came_in = max(first, others if others > _LOW else _FINITE)
        place = Place("before" if came_in else "output", self._last())
        state = max(out, came_in)
        self._bad[place] = max(state, self._bad.get(place, _FINITE))
        if state <= self.usual.get(place, _FINITE):
            return
        is_new_fault = self._state == _LOW and state > _LOW and first == _FINITE
        if self.suspect is None or is_new_fault:
            self.suspect, self._order, self._origin = place, order, came_in or out
        self._state = max(state, self._state)

    def loss(self, state: int) -> None:
        """Tell of a loss. One that is not finite is a fault. Of one that is, what came before did no harm."""
        self.saw_loss = True
        if state == _FINITE:
            self.clear()
        elif self.verdict is None:
            self._decide(state)

    def clear(self) -> None:
        """What was bad so far did no harm, and counts as usual."""
        for place, state in self._bad.items():
            self.usual[place] = max(state, self.usual.get(place, _FINITE))
        self._bad = {}
        self.suspect, self._state = None, _FINITE

    def end(self, batch: Mapping[str, int] | None) -> None:
        """End the step. Without a loss that was seen, the last output decides.

        Args:
            batch: How bad the entries of the batch are, where they count as usual if nothing is wrong.
        """
        if not self.saw_loss and self._last_state > _LOW and self.suspect is not None:
            self._decide(self._last_state)
        if self.verdict is None and self.saw_loss:
            self._bad |= {Place("batch", entry): state for entry, state in (batch or {}).items()}
            self.clear()

    def _last(self) -> str:
        """The last call: the path, and from the second call on its number, as in tags."""
        path = self._called[-1]
        number = self._called.count(path) - 1
        return f"{path}#{number}" if number else path

    def _decide(self, state: int) -> None:
        if self.suspect is None:
            self._origin, self._order = state, len(self._called)
        place = self.suspect or (Place("after", self._last()) if self._called else Place("loss"))
        self.verdict = self.step, self._order, self._cause(place)

    def _cause(self, place: Place) -> Place:
        """What made the bad value at a place: a parameter or the batch may have been bad before."""
        if place.kind == "output":
            owner = _without_call(place.path)
            return next((each for each in self.held if _owner(each) == owner), place)
        for entry, state in sorted((self.batch or {}).items(), key=lambda each: -each[1]):
            is_usual = state <= self.usual.get(Place("batch", entry), _FINITE)
            if not is_usual and (state > _LOW or self._origin == _LOW):
                return Place("batch", entry, self.batch_idx)
        # Not those of modules whose outputs were finite.
        held = next((each for each in self.held if _owner(each) not in self._called), None)
        if held is not None:
            return held
        return Place("first", place.path) if place.kind == "before" and self._order == 0 else place


class _ImmediateCheck:
    """The check on a CPU, where reading a value costs no waiting. What is healthy is looked at once, by its sum."""

    is_immediate = True

    def __init__(self, device: torch.device) -> None:
        self._held = _Held(None)
        self._usual: dict[Place, int] = {}
        self._trial: _Trial | None = None
        self._batch: list[tuple[str, Tensor, int]] = []
        self._early: dict[str, int] | None = None
        self._is_first = True
        self._changes_batch = False
        self._are_new = True
        self._found: Found | None = None

    def hold(self, module: nn.Module) -> None:
        self._held = _Held(module)

    def begin(self, step: int, batch: Any = None, batch_idx: int | None = None) -> None:
        self._close()
        self._trial, self._are_new = _Trial(step, self._usual, batch_idx), True
        self._batch = [(entry, x, _version(x)) for entry, x in tensors_in(batch)]
        # The step may change its batch in place. Whether it does so, the first one tells.
        self._early = self._batch_states() if self._is_first or self._changes_batch else None

    def update(self, path: str, given: Any, output: Any) -> None:
        trial = self._trial
        if trial is None or self._found is not None:
            return
        out = _state(output) if type(output) is Tensor else _worst(tensors_in(output))
        if out == _FINITE:
            trial.call_finite(path)
            return
        states = [_state(x) for _, x in tensors_in(given) if x is not output]
        before = trial.suspect
        trial.call(path, out, states[0] if states else _FINITE, max(states[1:], default=_FINITE))
        if trial.suspect is not before:
            self._look_at_parameters(trial)

    def update_sums(self, paths: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if self._trial is None or self._found is not None:
            return
        sums = torch.stack([*inputs, *outputs]).view(2, -1).tolist()
        for path, total_in, total_out in zip(paths, *sums, strict=True):
            self._trial.call(path, _state_of_sum(total_out), _state_of_sum(total_in))
        if self._trial.suspect is not None:
            self._look_at_parameters(self._trial)

    def update_loss(self, loss: Tensor) -> None:
        if self._trial is not None and self._found is None:
            state = _state(loss)
            if state != _FINITE:
                self._gather(self._trial)
            self._trial.loss(state)
            self._found = self._trial.verdict

    def expect_new_parameters(self) -> None:
        self._are_new = True

    def end(self) -> None:
        trial = self._trial
        if trial is not None and not trial.saw_loss and trial.suspect is not None:
            trained = self._held.trained()
            # Of a network without parameters, the last output decides.
            if trained and all(_state(x) == _FINITE for x in trained):
                trial.clear()
        self._close()

    def found(self) -> Found | None:
        self._close()
        return self._found

    def _close(self) -> None:
        trial, self._trial = self._trial, None
        if trial is None:
            return
        if self._found is None:
            if not trial.saw_loss and trial.suspect is not None:
                self._gather(trial)
            trial.end(self._early if self._is_first else None)
            self._found = trial.verdict
        self._changes_batch = self._changes_batch or any(_version(x) != version for _, x, version in self._batch)
        self._is_first, self._batch = False, []

    def _gather(self, trial: _Trial) -> None:
        if trial.suspect is None:
            self._look_at_parameters(trial)
        trial.batch = self._batch_states() if self._early is None else self._early

    def _look_at_parameters(self, trial: _Trial) -> None:
        if self._are_new:
            self._are_new = False
            trial.held = self._held.bad({place: _state(x) for place, x in self._held.tensors()})

    def _batch_states(self) -> dict[str, int]:
        return {entry: state for entry, x, _ in self._batch if (state := _state(x)) != _FINITE}


class _DeferredCheck:
    """The check on a GPU, whose results are read only when a monitor publishes.

    What happens in a step is written down, with the numbers of the sums that were taken. The sums stay on the device.
    """

    is_immediate = False

    def __init__(self, device: torch.device) -> None:
        self._held = _Held(None)
        self._usual: dict[Place, int] = {}
        self._notes: _Notes | None = None
        self._pending: list[_Notes] = []
        self._are_new = True
        self._is_first = True
        self._found: Found | None = None

    def hold(self, module: nn.Module) -> None:
        self._held = _Held(module)

    def begin(self, step: int, batch: Any = None, batch_idx: int | None = None) -> None:
        self._close()
        self._notes, self._are_new = _Notes(step, batch_idx, self._is_first), True
        self._is_first = False
        for entry, x in tensors_in(batch):
            self._notes.batch[entry] = self._notes.look(x)

    def update(self, path: str, given: Any, output: Any) -> None:
        if self._notes is None:
            return
        self._look_at_parameters()
        # An output that was changed in place is what came in, too.
        inputs = [self._notes.look(x) for _, x in tensors_in(given) if x is not output]
        outputs = [self._notes.look(x) for _, x in tensors_in(output)]
        self._notes.call(path, outputs, inputs)

    def update_sums(self, paths: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if self._notes is None:
            return
        self._look_at_parameters()
        for path, total_in, total_out in zip(paths, inputs, outputs, strict=True):
            self._notes.call(path, [self._notes.add(total_out)], [self._notes.add(total_in)])

    def update_loss(self, loss: Tensor) -> None:
        if self._notes is not None:
            self._look_at_parameters()
            self._notes.events.append(("loss", self._notes.look(loss)))

    def expect_new_parameters(self) -> None:
        self._are_new = True

    def end(self) -> None:
        if self._notes is not None:
            self._notes.end(self._held)
        self._close()

    def found(self) -> Found | None:
        self._close()
        pending, self._pending = self._pending, []
        for notes in pending:
            if self._found is None:
                self._found = notes.verdict(self._usual)
        return self._found

    def _close(self) -> None:
        notes, self._notes = self._notes, None
        if notes is not None and self._found is None:
            notes.close()
            self._pending.append(notes)
            if len(self._pending) > _MAX_PENDING:
                self.found()

    def _look_at_parameters(self) -> None:
        if self._are_new and self._notes is not None:
            self._are_new = False
            self._notes.hold(self._held)


class _Notes:
    """What happened in one step, with sums that lie on the device."""

    def __init__(self, step: int, batch_idx: int | None, is_first: bool) -> None:
        self.step = step
        self.batch_idx = batch_idx
        self.is_first = is_first
        self.batch: dict[str, int | None] = {}
        self.events: list[tuple[Any, ...]] = []
        self._sums: list[Tensor] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int | None]] = {}
        self._packed: list[tuple[list[int], Tensor]] = []

    def look(self, x: Tensor) -> int | None:
        """Take the sum of a tensor, unless it was taken already. Returns its number."""
        known = self._known.get(id(x))
        version = _version(x)
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        values = _plain(x)
        index = None if values is None else self.add(_device_sum(values))
        self._known[id(x)] = weakref.ref(x), version, index
        return index

    def add(self, total: Tensor) -> int:
        """Keep a sum. Returns its number."""
        self._sums.append(total)
        return len(self._sums) - 1

    def call(self, path: str, outputs: Sequence[int | None], inputs: Sequence[int | None]) -> None:
        """Note a call of a module."""
        self.events.append(("call", path, tuple(outputs), tuple(inputs)))

    @torch.no_grad()
    def hold(self, held: "_Held") -> None:
        """Look at parameters and buffers: one number for each, in few operations."""
        places, tensors = zip(*held.tensors(), strict=True) if held.tensors() else ((), ())
        if tensors:
            norms = torch._foreach_norm(list(tensors), math.inf)
            self.events.append(("held", held, places, tuple(self.add(norm) for norm in norms)))

    @torch.no_grad()
    def end(self, held: "_Held") -> None:
        """Look at parameters and gradients behind a step of which no loss was seen."""
        if not any(kind == "loss" for kind, *_ in self.events) and (tensors := held.trained()):
            norms = torch._foreach_norm(tensors, math.inf)
            self.events.append(("trained", *(self.add(norm) for norm in norms)))

    @torch.no_grad()
    def close(self) -> None:
        """Put the sums together, without waiting for the device."""
        alike = defaultdict(list)
        for index, total in enumerate(self._sums):
            alike[total.device, total.dtype].append(index)
        # Evaluations run in inference mode.
        with torch.inference_mode(False):
            self._packed = [
                (indices, torch.stack([self._sums[index] for index in indices])) for indices in alike.values()
            ]
        self._sums, self._known = [], {}

    def verdict(self, usual: dict[Place, int]) -> Found | None:
        """Read the sums, and tell a trial what happened."""
        read = {
            index: number
            for indices, packed in self._packed
            for index, number in zip(indices, packed.tolist(), strict=True)
        }

        def worst(indices: Sequence[int | None]) -> int:
            return max((_state_of_sum(read[index]) for index in indices if index is not None), default=_FINITE)

        trial = _Trial(self.step, usual, self.batch_idx)
        trial.batch = {entry: state for entry, index in self.batch.items() if (state := worst([index])) != _FINITE}
        for kind, *event in self.events:
            if kind == "held":
                held, places, indices = event
                trial.held = held.bad({place: worst([index]) for place, index in zip(places, indices, strict=True)})
            elif kind == "loss":
                trial.loss(worst(event))
            elif kind == "trained":
                if worst(event) == _FINITE:
                    trial.clear()
            else:
                path, outputs, inputs = event
                trial.call(path, worst(outputs), worst(inputs[:1]), worst(inputs[1:]))
        trial.end(trial.batch if self.is_first else None)
        return trial.verdict


class _Held:
    """The parameters and buffers of a network."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._tensors: list[tuple[Place, Tensor]] | None = None

    def __reduce__(self) -> Any:
        # A copy has no part in the training, and must not bring the network along.
        return _Held, (None,)

    def tensors(self) -> list[tuple[Place, Tensor]]:
        """The dense floating ones with their places. Of sharded ones, the part of this rank."""
        if self._module is None:
            return []
        if self._tensors is None:
            every: list[tuple[Place, Tensor]]
            every = [(Place("parameter", user_path(name)), x) for name, x in self._module.named_parameters()]
            every += [(Place("buffer", user_path(name)), x) for name, x in self._module.named_buffers()]
            self._tensors = every
        found = ((place, _plain(x)) for place, x in self._tensors if not is_lazy(x))
        return [(place, x) for place, x in found if x is not None]

    def trained(self) -> list[Tensor]:
        """The values of the parameters, and of their gradients that are there."""
        if self._module is None:
            return []
        found = [each for x in self._module.parameters() if not is_lazy(x) for each in (x, x.grad) if each is not None]
        return [values for x in found if (values := _plain(x)) is not None]

    def bad(self, states: Mapping[Place, int]) -> dict[Place, int]:
        """Those that are bad. The infinities of a buffer are a mask's."""
        return {
            place: state
            for place, state in states.items()
            if state == _NAN or (state != _FINITE and place.kind == "parameter")
        }


def _owner(place: Place) -> str:
    """The path of the module that holds it, as calls have it."""
    path = place.path.rpartition(".")[0]
    return written(path) if path else path


def _without_call(label: str) -> str:
    path, mark, number = label.rpartition("#")
    return path if mark and number.isdecimal() else label


def _plain(x: Tensor) -> Tensor | None:
    """The values of a tensor as a dense real one. ``None`` if there are none that could be read."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_complex() or x.is_nested or x.is_meta:
        if not (x.is_floating_point() or x.is_complex()):
            return None
        try:
            x = values_of(x).x
        except UnreadableError:
            return None
    return x.detach() if x.is_floating_point() and x.numel() else None


def _device_sum(x: Tensor) -> Tensor:
    """A number without dimensions that is NaN or infinite as the values are. Nothing waits for the device."""
    # No sum of float32 values overflows in float64. Apple's GPUs have no float64: there the extrema are looked at.
    if x.dtype is not torch.float64 and real_dtype(x.device) is torch.float64:
        return x.sum(dtype=torch.float64)
    return (torch.stack(torch.aminmax(x)) / 2).sum()


def _state_of_sum(total: float) -> int:
    if math.isfinite(total):
        return _FINITE
    return _NAN if math.isnan(total) else _HIGH if total > 0 else _LOW


def _worst(found: Iterator[tuple[str, Tensor]]) -> int:
    return max((_state(x) for _, x in found), default=_FINITE)


def _state(x: Tensor) -> int:
    values = _plain(x)
    # A sum is the cheapest test. It is not finite if a value is not, but also if it overflows: hence the second look.
    if values is None or math.isfinite(values.sum().item()):
        return _FINITE
    low, high = torch.aminmax(values)
    return _state_of_sum(low.item() / 2 + high.item() / 2)


def _version(x: Tensor) -> int:
    # Tensors of inference mode have no version. They cannot be changed behind autograd's back either.
    return 0 if x.is_inference() else x._version
