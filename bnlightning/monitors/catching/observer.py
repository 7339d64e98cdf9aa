"""The observer: hooks on the modules of a network, and what they do while a monitor looks."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnlightning.compare.names import written
from bnlightning.monitors.catching.backward import Backwards, leaf_behind
from bnlightning.monitors.catching.compiled import (
    add_receiver,
    copied,
    is_exporting,
    make_one,
    observe,
    observe_tap,
    remove_receiver,
)
from bnlightning.monitors.catching.contents import UnreadableError, Values, tensors_in, values_of
from bnlightning.monitors.catching.finite_check import FiniteCheck
from bnlightning.monitors.catching.hooks import (
    NoHook,
    apart,
    is_batched,
    is_recomputation,
    is_recorded,
    is_transformed,
    is_usual,
)
from bnlightning.monitors.catching.selection import (
    Choice,
    features,
    has_units,
    is_activation,
    is_chosen,
    is_unknown,
    may_overflow,
    modules_by_path,
    saturation_limits,
    unit_dim,
)
from bnlightning.monitors.catching.switch import Switch
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey, Limits
from bnlightning.monitors.counting.precision import counted_dtype, real_dtype
from bnlightning.monitors.words import labelled, listed
from bnlightning.nn.tap import add_listener, listeners_here, remove_listener

MAX_CALLS = 16
"""Largest number of calls of one module that are told apart. Further ones count as the last of them."""
# A layer whose number of units keeps changing, such as attention over sequences, has no units.
_MAX_NUMBERS_OF_UNITS = 4
_MAX_LISTED = 20
TAP = "tap"
"""What stands in the place of the class for a tensor that :func:`bnlightning.tap` shows."""


@dataclass(frozen=True)
class ModuleInfo:
    """What is known of a module, or of a tap, before it runs.

    Args:
        path: Path of the module, or name of the tap.
        is_watched: Whether its outputs are counted.
        is_checked: Whether its outputs are checked for NaN and infinities.
        is_activation: Whether it counts as an activation, and so under ``health/``.
        has_units: Whether its units are looked at.
        limits: The outputs beyond which it is saturated. ``None`` for an unbounded activation.
        features: The result of :func:`~bnlightning.monitors.catching.selection.features` for it.
        features_before: The same of the last layer before it that tells, in the order of ``named_modules``.
        module: Name of the module's class. :data:`TAP` for a tap.
    """

    path: str
    is_watched: bool
    is_checked: bool
    is_activation: bool
    has_units: bool
    limits: Limits | None
    features: tuple[int, bool] | None
    features_before: tuple[int, bool] | None = None
    module: str = TAP


@dataclass
class _Pass:
    """What one thread called in a forward pass: the number of calls by path, and the last layer that tells."""

    calls: dict[str, int] = field(default_factory=dict)
    features: tuple[int, bool] | None = None


class Observer:
    """Watches the modules of a network through one forward hook each, from :meth:`attach` to :meth:`detach`.

    The hooks are on the modules only while values are sampled or checked, as :class:`Switch` describes. Several threads
    may run the same network at once, each with its part of the batch. A call is then numbered within its thread.

    Args:
        choices: The modules to watch. ``None``: activations and normalisations.
        max_layers: Largest number of watched layers.

    Attributes:
        accumulators: The accumulators that values go into now. ``None`` while nothing is sampled.
        is_sampling: Whether there are accumulators.
        is_showing: Whether compiled graphs show values. They are guarded on it.
        is_summing: Whether compiled graphs add up values for a check, likewise.
        home: The thread that runs the steps.
        check: The check for non-finite values that is running. ``None`` while none is.
        grad_scale: Factor for the gradients of outputs. ``None``: gradients are not counted.
        backwards: The backward passes whose gradients count.
        modules: The modules that have a hook.
        refused: Paths of modules that take no hook.
        without_tensor: Type of the output, by path, of modules that put out no floating tensor.
        unreadable: Kind of tensor, by layer, of what cannot be counted.
        left_out: Layers beyond ``max_layers``.
        unknown: Paths, by class, of modules that are not watched because nothing tells what they are.
        transformed: The first layer that was called inside a transform of ``torch.func``. Such calls are left out.
    """

    def __init__(self, choices: Sequence[Choice] | None, max_layers: int) -> None:
        self.choices = choices
        self.max_layers = max_layers
        self.accumulators: LayerAccumulators | None = None
        self.check: FiniteCheck | None = None
        self.grad_scale: float | None = None
        self.backwards = Backwards()
        self.modules: list[ModuleInfo] = []
        self.refused: list[str] = []
        self.without_tensor: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.left_out: dict[str, None] = {}
        self.unknown: dict[str, list[str]] = {}
        self.transformed: str | None = None
        self._labels: dict[str, set[int]] = {}
        self._module_of: dict[str, str] = {}
        self._passes: dict[threading.Thread, _Pass] = {}
        self._hooks: list[_Hook] = []
        self._switch: Switch | None = None
        self._number: Tensor | None = None
        self.one: Tensor | None = None
        self._watches: set[int] = set()
        self.lock = threading.RLock()
        self._checks_every_batch = True
        self.is_sampling = self.is_showing = self.is_summing = self._is_in_batch = False
        self.home = threading.current_thread()

    def __reduce__(self) -> Any:
        # A copy in the middle of a fit has no part in that fit.
        return Observer, (self.choices, self.max_layers)

    @property
    def watched(self) -> list[str]:
        """Paths of the modules that are watched."""
        return [info.path for info in self.modules if info.is_watched]

    @property
    def seen(self) -> list[str]:
        """The layers seen so far: paths with the number of the call and the place in the output."""
        return list(self._labels)

    def report(self, seen: Sequence[str], *, has_activation: bool = True) -> str:
        """Sentences on what is watched and what cannot be.

        Args:
            seen: The layers that were seen on any rank.
            has_activation: Whether one of them is an activation.
        """
        paths = {_path_of(label) for label in seen}
        named = listed([labelled(label, self.module_of(label)) for label in seen], _MAX_LISTED)
        sentences = [f"{len(seen)} layer{'s are' if len(seen) != 1 else ' is'} watched: {named}."]
        paths |= self.without_tensor.keys() | {_path_of(label) for label in self.unreadable}
        unseen = [path for path in self.watched if path not in paths]
        if unseen:
            sentences.append(f"These were not called so far: {listed(unseen, _MAX_LISTED)}.")
        if self.without_tensor:
            described = [f"{path} ({kind})" for path, kind in self.without_tensor.items()]
            sentences.append(f"These put out no floating tensor: {listed(described, _MAX_LISTED)}.")
        if self.unreadable:
            described = [f"{label} ({kind})" for label, kind in self.unreadable.items()]
            sentences.append(f"These are left out, for they cannot be counted: {listed(described, _MAX_LISTED)}.")
        if self.unknown:
            sentences.append(self.report_unknown())
        if self.refused:
            sentences.append(f"TorchScript compiled these, and takes no hooks: {listed(self.refused, _MAX_LISTED)}.")
        if not has_activation:
            sentences.append(
                "No activation is among them. One that is called as a function, such as torch.relu(x), cannot be seen: "
                "make it a module, or show it by bnlightning.tap(x, 'name')."
            )
        return " ".join(sentences)

    def report_unknown(self) -> str:
        """A sentence on the modules that are not watched because nothing tells what they are. Empty without any."""
        if not self.unknown:
            return ""
        described = [f"{name} ({listed(paths, _MAX_LISTED)})" for name, paths in self.unknown.items()]
        first = next(iter(self.unknown.values()))[0]
        return (
            "The classes of these do not say what they are, so they are not watched: "
            f"{listed(described, _MAX_LISTED)}. If some activate or normalise, choose them and all others by "
            f"`modules`, such as modules=[{first!r}]."
        )

    def module_of(self, label: str) -> str:
        """The class of the module that a layer is a call of. :data:`TAP` for a tap.

        Args:
            label: Path of the module, with the number of the call and the place in the output.
        """
        # Another rank may have called a module that this one has not.
        return self._module_of.get(label) or self._module_of.get(_path_of(label), TAP)

    def attach(self, module: nn.Module, checks: bool, device: torch.device) -> None:
        """Put hooks on the modules of ``module``.

        Args:
            module: The network.
            checks: Whether there will be a check, which needs hooks on further modules.
            device: The device of the network.
        """
        self.detach()
        self._switch = Switch(module)
        self._number, self.one = add_receiver(self._receive, self._receive_tap), make_one(device)
        before = None
        for paths, submodule in modules_by_path(module):
            path = next((path for path in paths if path and is_chosen(self.choices, path, submodule)), paths[0])
            info = _module_info(path, submodule, self.choices, checks, before)
            if path and self.choices is None and not info.is_watched and is_unknown(submodule):
                self.unknown.setdefault(type(submodule).__name__, []).append(path)
            if info.is_watched or info.is_checked or info.features is not None:
                self._hook(self._switch, info, submodule, device)
            before = info.features or before
            self._module_of[info.path] = info.module
            self._watches.add(_identity(submodule))
        self.home = threading.current_thread()
        add_listener(self)

    def detach(self) -> None:
        """Take all hooks away, and forget what they saw."""
        if self._switch is not None:
            self._switch.remove()
        remove_listener(self)
        if self._number is not None:
            remove_receiver(self._number)
        self.accumulators = self.check = self._switch = self._number = self.one = self.transformed = None
        self.is_sampling = self.is_showing = self.is_summing = self._is_in_batch = False
        self._checks_every_batch = True
        known = self.unreadable, self.unknown, self._labels, self._module_of, self._passes, self._watches
        for names in (self.refused, self.without_tensor, self.left_out, *known):
            names.clear()
        for hooks in (self._hooks, self.modules):
            hooks.clear()

    def start(self, accumulators: LayerAccumulators | None, is_training: bool = False) -> None:
        """Begin a batch: send values into ``accumulators``, or nowhere. The next call of each module is its first.

        Args:
            accumulators: Where values go.
            is_training: Whether it is a training batch.
        """
        self.accumulators = accumulators
        self.is_sampling, self._is_in_batch = accumulators is not None, True
        self.home = threading.current_thread()
        self._decide_on_graphs(is_training)
        self.start_pass()
        self._turn()

    def stop(self) -> None:
        """End a batch: stop sampling."""
        self.accumulators = None
        self.is_sampling = self.is_showing = self.is_summing = self._is_in_batch = False
        self._passes.clear()
        self._turn()

    def start_check(self, check: FiniteCheck) -> None:
        """Show ``check`` the values of all modules that are checked."""
        self.check = check
        totals = [total for hook in self._hooks for total in hook.sums] if self._is_compiled else []
        if totals:
            torch._foreach_zero_(totals)
        self._turn()

    def stop_check(self) -> None:
        """Show nothing to a check any more."""
        self.check = None
        self._turn()

    def look_at_sums(self) -> None:
        """Have the check look at what compiled modules have added up since the last call of this."""
        hooks = [hook for hook in self._hooks if hook.info.is_checked] if self._is_compiled else []
        if hooks and self.check is not None:
            inputs, outputs = zip(*(hook.sums for hook in hooks), strict=True)
            self.check.update_sums(
                [hook.info.path for hook in hooks], [x.clone() for x in inputs], [x.clone() for x in outputs]
            )
            torch._foreach_zero_([*inputs, *outputs])

    def start_pass(self) -> None:
        """Begin a forward pass: the next call of each module is its first."""
        self._passes.clear()

    def watches(self, module: nn.Module) -> bool:
        """Whether ``module`` is the network, a part of it, or a replica of either."""
        return _identity(module) in self._watches

    def on_call(self, info: ModuleInfo, given: tuple[Any, ...], output: Any) -> None:
        """Take what a module took in and put out, while sampling or checking."""
        if not self.is_sampling and self.check is None:
            return
        if is_usual():
            self._take(info, given, output)
        elif is_transformed():
            self.transformed = self.transformed or info.path
        elif not is_recorded():
            with apart():
                self._take(info, given, output)

    def hear(self, name: str, x: Tensor, limits: Limits | None) -> None:
        """Take a tensor that :func:`bnlightning.tap` shows."""
        if self.accumulators is None or is_recomputation():
            return
        if is_transformed():
            self.transformed = self.transformed or name
        elif not is_recorded():
            with apart():
                self._record(ModuleInfo(written(name), True, False, True, True, limits, None), [("", x)])

    def trace(self, name: str, x: Tensor, limits: Limits | None) -> None:
        """Leave the call of an operator in a compiled graph, for a tensor that :func:`bnlightning.tap` shows."""
        if self.is_showing and not is_exporting() and not is_transformed():
            low, high = limits if limits is not None else (-math.inf, math.inf)
            observe_tap(copied(x, self.one), self._number, name, low, high)

    def _receive(self, index: int, position: int, x: Tensor) -> None:
        """Take a value from inside a compiled graph."""
        info = self.modules[index]
        if self.accumulators is None or is_recomputation():
            return
        self._pass().features = info.features_before
        self._record(info, [(f":{position}" if position >= 0 else "", x)], is_new_call=position <= 0)

    def _receive_tap(self, name: str, x: Tensor, limits: Limits | None) -> None:
        # Threads share compiled graphs. Only now is known which one runs this.
        if self in listeners_here():
            self.hear(name, x, limits)

    @property
    def _is_compiled(self) -> bool:
        return self._switch is not None and self._switch.is_compiled

    def _decide_on_graphs(self, is_training: bool) -> None:
        """Decide what compiled graphs leave out. Never are there more than two kinds of graphs for training batches."""
        is_checked = is_training and self.check is not None
        self._checks_every_batch &= is_checked or not is_training
        if self._checks_every_batch:
            self.is_showing, self.is_summing = self.is_sampling, is_checked
        else:
            # Batches that nobody looks at have the graph that they have without a monitor.
            self.is_showing = self.is_sampling or is_checked
            self.is_summing = is_training and self.is_showing

    def _turn(self) -> None:
        if self._switch is None:
            return
        if self._is_in_batch or self.check is not None:
            self._switch.begin(self.is_sampling or self.check is not None)
        else:
            self._switch.end()

    def _pass(self) -> _Pass:
        return self._passes.setdefault(threading.current_thread(), _Pass())

    def _hook(self, switch: Switch, info: ModuleInfo, module: nn.Module, device: torch.device) -> None:
        hook = _Hook(self, info, len(self.modules), device)
        try:
            switch.add(module, hook)
        except RuntimeError:
            # Compiled by TorchScript.
            self.refused.append(info.path)
            return
        self._hooks.append(hook)
        self.modules.append(info)

    def _take(self, info: ModuleInfo, given: tuple[Any, ...], output: Any) -> None:
        if info.is_checked and self.check is not None:
            # Recomputations need not be told apart: they find nothing that the first computation did not.
            self.check.update(info.path, given, output)
        if self.is_sampling and not is_recomputation():
            if info.features is not None:
                self._pass().features = info.features
            if info.is_watched:
                self._record_output(info, output)

    def _record_output(self, info: ModuleInfo, output: Any) -> None:
        found = list(tensors_in(output))
        if found:
            self._record(info, found)
        else:
            self.without_tensor[info.path] = type(output).__name__

    def _record(self, info: ModuleInfo, found: Sequence[tuple[str, Tensor]], is_new_call: bool = True) -> None:
        with self.lock:
            numbers = self._pass().calls
            calls = numbers[info.path] = numbers.get(info.path, 0) + is_new_call
            call = min(calls, MAX_CALLS) - 1
            for suffix, tensor in found:
                label = info.path + (f"#{call}" if call else "") + suffix
                try:
                    values = values_of(tensor)
                except UnreadableError as kind:
                    self.unreadable.setdefault(label, str(kind))
                    continue
                if self._has_room(label):
                    self._update(info, label, tensor, values)

    def _has_room(self, label: str) -> bool:
        if label not in self._labels and len(self._labels) >= self.max_layers:
            self.left_out[label] = None
            return False
        return True

    def _update(self, info: ModuleInfo, label: str, tensor: Tensor, values: Values) -> None:
        accumulators = self.accumulators
        assert accumulators is not None
        numbers = self._labels.setdefault(label, set())
        dim = unit_dim(values.shape, self._pass().features)
        units = (values.shape[dim] if len(values.shape) > 1 else 1) if info.has_units else 0
        if units not in numbers and len(numbers) >= _MAX_NUMBERS_OF_UNITS:
            units = 0
        numbers.add(units)
        self._module_of[label] = info.module
        is_wide = counted_dtype(values.x) is torch.float64
        key = LayerKey(label, info.is_activation, units, info.limits if units else None, is_wide=is_wide)
        accumulators.update(key, values.x, dim, values.lengths)
        if self.grad_scale is not None and tensor.requires_grad:
            key = LayerKey(label, is_gradient=True, is_wide=is_wide)
            tensor.register_hook(_GradHook(self, accumulators, key, leaf_behind(tensor)))


class _Hook:
    """A module's forward hook. A copied or pickled module has one that does nothing instead."""

    def __init__(self, observer: Observer, info: ModuleInfo, index: int, device: torch.device) -> None:
        self.observer = observer
        self.info = info
        self.is_checked = info.is_checked
        self.is_watched = info.is_watched
        with torch.inference_mode(False):
            self.number = observer._number
            self.index = torch.tensor(index)
            # Sums over what the module takes in and puts out, added up inside of compiled graphs.
            zeros = torch.zeros(2, dtype=real_dtype(device), device=device) if info.is_checked else torch.zeros(0)
            self.sums = [zero.clone() for zero in zeros]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            self._trace(args, output)
            return
        self.observer.on_call(self.info, (args, kwargs) if kwargs else args, output)

    def __reduce__(self) -> Any:
        return NoHook, ()

    def _trace(self, args: tuple[Any, ...], output: Any) -> None:
        """The part of the hook that goes into a compiled graph: only what the graph can be guarded on."""
        observer = self.observer
        if is_exporting():
            return
        if is_transformed():
            if observer.is_showing:
                observer.transformed = self.info.path
            return
        found = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple | list) else []
        if self.is_checked and observer.is_summing:
            for total, values in zip(self.sums, (args, found), strict=True):
                for x in filter(_is_traced, values):
                    total.add_(x.detach().sum(dtype=total.dtype))
        if self.is_watched and observer.is_showing:
            for position, x in enumerate(found):
                if _is_traced(x):
                    observe(copied(x, observer.one), self.number, self.index, -1 if found[0] is output else position)


class _GradHook:
    """A tensor's gradient hook. A module's backward hook would break in-place operations behind the module."""

    def __init__(self, observer: Observer, accumulators: LayerAccumulators, key: LayerKey, leaf: Any) -> None:
        self.observer = observer
        self.accumulators = accumulators
        self.key = key
        self.leaf = leaf

    def __call__(self, grad: Tensor) -> None:
        observer = self.observer
        if observer.accumulators is not self.accumulators or observer.grad_scale is None:
            return
        if is_transformed() or is_batched(grad) or is_recorded() or not observer.backwards.counts(self.leaf):
            return
        try:
            values = values_of(grad).x
        except UnreadableError:
            return
        with apart(), observer.lock:
            self.accumulators.update(self.key, values.to(counted_dtype(values)) * observer.grad_scale)


def _is_traced(x: Any) -> bool:
    # Within a graph, other types may know nothing of our operators.
    return type(x) is Tensor and x.is_floating_point()


def _identity(module: nn.Module) -> int:
    # Replicas, such as those of nn.DataParallel, are other objects, but have the same dictionary of hooks.
    return id(module._forward_hooks)


def _module_info(
    path: str,
    module: nn.Module,
    choices: Sequence[Choice] | None,
    checks: bool,
    before: tuple[int, bool] | None,
) -> ModuleInfo:
    is_leaf = next(module.children(), None) is None
    return ModuleInfo(
        path=written(path) if path else path,
        # The LightningModule itself is not called in training.
        is_watched=path != "" and is_chosen(choices, path, module),
        is_checked=checks and is_leaf and may_overflow(module),
        is_activation=is_activation(module),
        has_units=has_units(module),
        limits=saturation_limits(module),
        features=features(module) if is_leaf else None,
        features_before=before,
        module=type(module).__name__,
    )


def _path_of(label: str) -> str:
    return label.partition("#")[0].partition(":")[0]
