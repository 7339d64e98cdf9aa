"""The change of one layer in a swap: how it is made, checked and undone."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.parameter import is_lazy

from bnlightning.nn.batch_norm import _ConventionBatchNorm

_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


class Absent:
    """Stands in the place of a value: the attribute does not exist."""


class Change(Protocol):
    """The change of one layer: ``apply`` makes it, ``undo`` undoes it if nothing else has changed the layer since."""

    def apply(self) -> None: ...

    def is_intact(self) -> bool: ...

    def undo(self) -> None: ...


@dataclass
class InPlace:
    """A change of the object's class and attributes. Applied a second time, it restores the first state."""

    layer: Any
    cls: type[nn.Module]
    attributes: dict[str, Any]
    note: str = ""

    def __post_init__(self) -> None:
        self._expected = self.cls
        self.after = _public_name(self.cls)

    def apply(self) -> None:
        before = _initial_statistics(self.layer)
        self._exchange()
        after = _initial_statistics(self.layer)
        try:
            if before is not None and after not in (None, before) and _are_untouched(self.layer, before):
                self.layer.reset_running_stats()
        except BaseException:
            self._exchange()
            raise

    undo = apply

    def is_intact(self) -> bool:
        return type(self.layer) is self._expected

    def _exchange(self) -> None:
        attributes = vars(self.layer)
        previous = {name: attributes.get(name, Absent) for name in self.attributes}
        # First, because only this line can fail.
        self.layer.__class__, self.cls = self.cls, type(self.layer)
        for name, value in self.attributes.items():
            if value is Absent:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        self.attributes = previous


@dataclass
class Replacement:
    """A change that puts another object in the layer's place, in every parent."""

    old: nn.Module
    new: nn.Module
    places: list[tuple[nn.Module, str]]

    def __post_init__(self) -> None:
        self.after = class_name(self.new)
        self._carried = {
            store: [name for name, value in getattr(self.new, store).items() if self._fits(store, name, value)]
            for store in ("_parameters", "_buffers")
        }
        self._own_hooks = {name: vars(self.new)[name] for name in _HOOKS}
        self.note = self._describe()

    def _fits(self, store: str, name: str, value: Tensor | None) -> bool:
        kept = getattr(self.old, store).get(name)
        return kept is not None and value is not None and not is_lazy(value) and kept.shape == value.shape

    def _describe(self) -> str:
        carried = [name for names in self._carried.values() for name in names]
        old, new = (
            [name for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if name not in carried]
            for layer in (self.old, self.new)
        )
        parts = {"carried over": carried, "new": new, "left behind": old}
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)

    def apply(self) -> None:
        self._move_tensors(self.old, self.new)
        # The dictionaries themselves move, because handles refer to them. The new module's own hooks are added.
        for name, own in self._own_hooks.items():
            shared = vars(self.old)[name]
            shared.update(own)
            vars(self.new)[name] = shared
        self._hand_over(self.old, self.new)

    def undo(self) -> None:
        self._move_tensors(self.new, self.old)
        for name, own in self._own_hooks.items():
            for key in own:
                vars(self.old)[name].pop(key, None)
            vars(self.new)[name] = own
        self._hand_over(self.new, self.old)

    def is_intact(self) -> bool:
        return all(parent._modules.get(name) is self.new for parent, name in self.places)

    def _move_tensors(self, source: nn.Module, target: nn.Module) -> None:
        for store, names in self._carried.items():
            for name in names:
                getattr(target, store)[name] = getattr(source, store)[name]

    def _hand_over(self, source: nn.Module, target: nn.Module) -> None:
        if source._is_full_backward_hook is not None:
            target._is_full_backward_hook = source._is_full_backward_hook
        for hook in target._load_state_dict_pre_hooks.values():
            if getattr(hook, "with_module", False):
                # Otherwise the hook would be called with the module that is no longer in place.
                vars(hook)["module"] = weakref.ref(target)
        target.train(source.training)
        for parent, name in self.places:
            parent._modules[name] = target


def _initial_statistics(layer: nn.Module) -> tuple[float, float] | None:
    """Return the initial values of the layer's running mean and variance, or ``None`` if it is no batch norm layer."""
    if isinstance(layer, _ConventionBatchNorm):
        return layer.convention.initial_mean, layer.convention.initial_var
    return (0.0, 1.0) if isinstance(layer, _TorchBatchNorm) else None


def _are_untouched(layer: Any, initial: tuple[float, float]) -> bool:
    statistics = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    if any(value is None or value.is_meta for value in statistics):
        return False
    return all(bool((value == start).all()) for value, start in zip(statistics, (*initial, 0), strict=True))


def class_name(layer: nn.Module) -> str:
    """Return the name by which the class of ``layer`` is imported."""
    return _public_name(type(layer))


def _public_name(cls: type) -> str:
    for inside, public in (("torch.nn.modules.", "torch.nn"), ("bnlightning.nn.", "bnlightning")):
        if cls.__module__.startswith(inside):
            return f"{public}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
