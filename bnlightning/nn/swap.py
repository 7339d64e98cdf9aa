"""The swap of all batch norm layers of a network to none, ours, torch's, synchronised or any other, and back.

A swap by name changes the class of the layer object, as torch's parametrisations and lazy modules do. Nothing is
copied. Everything that holds the layer or a part of it still holds the right object: parents under several names,
lists, optimizers, hooks and their handles. Only a callable puts another object in the layer's place.
"""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnlightning.nn._swap_changes import Absent, Change, InPlace, Replacement, class_name
from bnlightning.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _ConventionBatchNorm, warn_of_momentum
from bnlightning.nn.convention import CONVENTIONS, Convention, convention_name

_OURS: dict[type[nn.Module], type[_ConventionBatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_IN_PLACE = ("none", "custom", "torch", "sync")
# A layer that overrides one of these does more than normalise: it may activate too, or stay in evaluation mode.
_METHODS: dict[str, tuple[Callable[..., Any], ...]] = {
    "forward": (_TorchBatchNorm.forward, _ConventionBatchNorm.forward, nn.SyncBatchNorm.forward),
    "train": (nn.Module.train,),
    "__call__": (nn.Module.__call__,),
}
# What a class has without its author's doing, and what has done its work when the layer is built.
_INERT = frozenset(
    {
        *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__init__", "__new__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__"),
        *("__firstlineno__", "__orig_bases__", "__parameters__", "__constants__", "__abstractmethods__", "_abc_impl"),
    }
)
_OWN_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_KEPT_ARGUMENTS = ("num_features", "affine", "track_running_stats", "bias", "device", "dtype")
# By name, because importing these classes takes longer than a swap.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


class _RefusedError(Exception):
    """A layer that cannot be swapped; the message is the reason."""


@dataclass(frozen=True)
class SwappedLayer:
    """One layer that was swapped.

    Args:
        paths: All names of the layer in the module, as in ``named_modules``.
        before: Name of its class before the swap.
        after: Name of its class after the swap.
        note: Other changes of the swap, and settings that it could not keep.

    Example:
        >>> report = swap_norm(nn.Sequential(nn.BatchNorm1d(3)), "custom")
        >>> report.swapped
        [SwappedLayer(paths=('0',), before='torch.nn.BatchNorm1d', after='bnlightning.BatchNorm1d', note='')]
    """

    paths: tuple[str, ...]
    before: str
    after: str
    note: str = ""


@dataclass
class SwapReport:
    """The result of :func:`swap_norm`. It prints as a table.

    Args:
        to: Target of the swap.
        swapped: The layers that were swapped, in the order of ``named_modules``.
        unchanged: Names of the layers that were the target already.
        skipped: Names of the layers that could not be swapped, each with the reason. Filled with ``strict=False`` only.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 30), nn.BatchNorm1d(30))
        >>> report = swap_norm(network, "none")
        >>> network[1]
        Identity()
        >>> report.revert()
        >>> type(network[1]) is nn.BatchNorm1d
        True
    """

    to: str
    swapped: list[SwappedLayer] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Make every swapped layer what it was: class, attributes, parameters, buffers and object, under every name.

        Parameters and running statistics keep what training has done to them since. Running statistics that the swap
        set to new initial values, and that no batch has touched since, get the former initial values. Tensors that the
        swap set aside (``"none"``, a callable) return on the device and in the dtype they had. A second call does
        nothing.

        Raises:
            RuntimeError: If a layer has been swapped or replaced again since. Then nothing is changed.
        """
        for layer, change in zip(self.swapped, self._changes, strict=False):
            if not change.is_intact():
                raise RuntimeError(
                    f"{_named(layer.paths)} has been changed after this swap to {self.to}: revert later swaps first."
                )
        changes, self._changes = self._changes, []
        for change in reversed(changes):
            change.undo()

    def __str__(self) -> str:
        lines = [f"to {self.to}: {len(self.swapped)} swapped, {len(self.unchanged)} unchanged, "]
        lines[0] += f"{len(self.skipped)} skipped"
        alike = defaultdict(list)
        for layer in self.swapped:
            alike[layer.before, layer.after, layer.note].append(_named(layer.paths))
        for (before, after, note), names in alike.items():
            lines.append(
                f"  {len(names):>3} x {before} -> {after}: {_shortened(names)}" + (f" ({note})" if note else "")
            )
        lines += [f"  skipped {_named([path])}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def swap_norm(
    module: nn.Module, to: str | Callable[..., nn.Module], *, strict: bool = True, **options: Any
) -> SwapReport:
    """Swap every batch norm layer of ``module`` in place, and report what was done.

    Parameters and buffers stay the same tensors if the target has them. So a state_dict still fits, and an optimizer
    that was built before still trains them. Hooks and their handles work, and the training flag stays. Instance norm
    layers are left alone.

    Args:
        module: A network, or a layer.
        to: Target of the swap:

            - ``"custom"``: our layer of the same dimension. It keeps the ``eps`` and ``momentum`` of the layer unless
              ``options`` give others (``eps=None, momentum="convention"`` takes the convention's). A layer that is ours
              already takes the given options and keeps its other settings, except that it stops synchronising.
            - ``"sync"``: as ``"custom"``, with statistics over all ranks.
            - ``"torch"``: torch's layer of the same dimension. Weights and running statistics are not rescaled. The
              report's notes name the parts of a convention that torch's layer does not have.
            - ``"none"``: the identity. The report keeps parameters and buffers for the way back.
            - a callable: it gets ``num_features`` and ``options``, and returns the module that takes the layer's place
              in every parent. Parameters and buffers of the same name and shape move to it. References from outside
              ``module`` still point to the old layer.

            Running statistics that no batch has touched are set to the initial values of the new convention.
        strict: Whether a layer that cannot be swapped is an error, or a module without batch norm layers
            (``to="none"`` allows that). Otherwise such layers are left alone, with one warning, and listed in the
            report.
        **options: For ``"custom"`` and ``"sync"``: ``convention``, ``backend``, ``eps``, ``momentum`` and
            ``process_group`` of our layer. For ``"torch"``: ``eps`` and ``momentum``. For a callable: its own keyword
            arguments.

    Returns:
        A report that names every layer and what was done to it. :meth:`SwapReport.revert` undoes the swap. Swapping a
        second time changes nothing, except with a callable.

    Raises:
        ValueError: If an argument is not known. With ``strict``, if a layer cannot be swapped. Such layers override
            ``forward`` or ``train``, are parametrised, lazy without parameters, compiled by TorchScript or sharded, or
            have an unknown dimension (:class:`torch.nn.SyncBatchNorm`). Layers of a subclass with methods, properties
            or attributes of its own cannot be swapped to another class, which would lose them. Layers inside DDP or
            FSDP and layers with other tensors or modules of their own cannot be swapped to ``"none"`` or a callable.
            After any error the module is as before.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 30), nn.BatchNorm1d(30))
        >>> print(swap_norm(network, "custom", convention="keras", eps=1e-3, momentum=0.5))
        to custom: 1 swapped, 0 unchanged, 0 skipped
            1 x torch.nn.BatchNorm1d -> bnlightning.BatchNorm1d: 1 (convention='keras'; eps=0.001; momentum=0.5)
    """
    _check_arguments(module, to, options)
    if isinstance(to, str) and isinstance(options.get("momentum"), float):
        warn_of_momentum(options["momentum"], stacklevel=3)
    report = SwapReport(to if isinstance(to, str) else getattr(to, "__name__", repr(to)))
    layers = _batch_norm_layers(module)
    if strict and not layers and to != "none":
        raise ValueError(
            f"module={type(module).__name__}(...) has no batch norm layer that could be swapped to {report.to}: build "
            "its layers first, or pass strict=False."
        )
    under_wrapper = _inside_wrappers(module)
    for layer, paths in layers:
        try:
            change = _planned(module, layer, to, options, id(layer) in under_wrapper)
        except _RefusedError as refusal:
            report.skipped.update(dict.fromkeys(paths, str(refusal)))
            continue
        if change is None:
            report.unchanged += paths
        else:
            report.swapped.append(SwappedLayer(tuple(paths), class_name(layer), change.after, change.note))
            report._changes.append(change)
    _report_refusals(report, strict)
    _apply_all(report._changes)
    return report


def _check_arguments(module: nn.Module, to: str | Callable[..., nn.Module], options: dict[str, Any]) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"module={module!r} is not possible: pass a torch.nn.Module.")
    # A module is callable too, but it does not build a layer.
    if to not in _IN_PLACE if isinstance(to, str) else not callable(to) or isinstance(to, nn.Module):
        raise ValueError(
            f"to={to!r} is not known: choose one of {', '.join(_IN_PLACE)}, or pass a callable that builds a module "
            "from the number of features."
        )
    if callable(to) and isinstance(module, _TorchBatchNorm):
        raise ValueError(
            f"module={module!r} is itself a batch norm layer, and a callable cannot replace it in the variable that "
            f"holds it: use to(num_features) in its place, or pass a module that contains the layer."
        )
    if isinstance(to, str):
        _check_options(to, options)


def _check_options(to: str, options: dict[str, Any]) -> None:
    if to in ("none", "torch"):
        known = {"none": (), "torch": ("eps", "momentum")}[to]
        unknown = [name for name in options if name not in known]
        if unknown:
            takes = " and ".join(known) or "no options"
            raise ValueError(
                f"{unknown[0]}={options[unknown[0]]!r} is not possible for to={to!r}, which takes {takes}."
            )
    for name in _KEPT_ARGUMENTS:
        if name in options:
            raise ValueError(
                f"{name}={options[name]!r} is not possible: a swapped layer keeps its parameters and buffers."
            )
    known = (*(each.name for each in _own_parameters() if each.name != "sync"), "eps", "momentum")
    unknown = [name for name in options if name not in (*known, *_KEPT_ARGUMENTS, "sync")]
    if unknown and to in ("custom", "sync"):
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r} is not known: choose among {', '.join(known)}.")
    if "sync" in options:
        raise ValueError(f'sync={options["sync"]!r} is not possible: choose by to="sync" or to="custom".')


def _batch_norm_layers(module: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return every batch norm layer with all its names."""
    layers: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        scripted = isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in getattr(layer, "original_name", "")
        if scripted or isinstance(layer, _TorchBatchNorm):
            layers.setdefault(id(layer), (layer, []))[1].append(path)
    return list(layers.values())


def _inside_wrappers(module: nn.Module) -> set[int]:
    wrappers = (layer for layer in module.modules() if _is_wrapper(layer))
    return {id(layer) for wrapper in wrappers for layer in wrapper.modules()}


def _is_wrapper(layer: nn.Module) -> bool:
    return any(cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch.") for cls in type(layer).__mro__)


def _planned(
    root: nn.Module,
    layer: nn.Module,
    to: str | Callable[..., nn.Module],
    options: dict[str, Any],
    is_under_wrapper: bool,
) -> InPlace | Replacement | None:
    """Return the change of one layer, not yet made, or ``None`` if the layer is the target already."""
    _refuse_in_any_case(layer)
    if to == "none" or callable(to):
        _refuse_if_the_class_has_more(layer)
        _refuse_if_parameters_are_in_use(layer, is_under_wrapper)
        return _built(root, layer, to, options) if callable(to) else _to_identity(layer)
    base = next((base for base in _OURS if isinstance(layer, base)), None)
    if base is None:
        raise _RefusedError(
            f"{type(layer).__name__} does not say its dimension: swap before it is made, or pass a callable"
        )
    change = _to_torch(layer, base, options) if to == "torch" else _to_ours(layer, base, str(to), options)
    if change.cls is not type(layer):
        _refuse_if_the_class_has_more(layer)
    now = {name: vars(layer).get(name, Absent) for name in change.attributes}
    return None if change.cls is type(layer) and now == change.attributes else change


def _refuse_in_any_case(layer: nn.Module) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise _RefusedError("compiled by TorchScript: swap before compiling")
    if any(map(is_lazy, (*layer.parameters(), *layer.buffers()))):
        raise _RefusedError("lazy, with no parameters yet: call the module on a batch first")
    if parametrize.is_parametrized(layer):
        raise _RefusedError("parametrised: call torch.nn.utils.parametrize.remove_parametrizations first")
    if _is_wrapper(layer):
        raise _RefusedError("sharded by fully_shard: swap before sharding")
    own = next((name for name, known in _METHODS.items() if getattr(type(layer), name) not in known), None)
    if own or "forward" in vars(layer):
        raise _RefusedError(
            f"{type(layer).__name__} has its own {own or 'forward'}, which would be lost: replace the layer by hand"
        )


def _refuse_if_the_class_has_more(layer: nn.Module) -> None:
    own = [
        name
        for cls in type(layer).__mro__
        if not cls.__module__.startswith(("torch.", "bnlightning.nn.", "builtins", "typing", "abc"))
        for name in vars(cls)
        if name not in _INERT and name not in _slots(cls)
    ]
    if own:
        raise _RefusedError(
            f"{type(layer).__name__} has its own {', '.join(dict.fromkeys(own))}, which would be lost: replace the "
            "layer by hand"
        )


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _refuse_if_parameters_are_in_use(layer: nn.Module, is_under_wrapper: bool) -> None:
    if is_under_wrapper:
        raise _RefusedError("inside DDP or FSDP, which hold its parameters: swap before wrapping")
    others = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())} - _OWN_TENSORS
    if others:
        raise _RefusedError(
            f"holds tensors of its own, which would be lost ({', '.join(sorted(others))}): remove them first"
        )
    parts = [name for name, _ in layer.named_children()]
    if parts:
        raise _RefusedError(f"holds modules of its own, which would be lost ({', '.join(parts)}): remove them first")


def _to_identity(layer: nn.Module) -> InPlace:
    return InPlace(layer, nn.Identity, {"_parameters": {}, "_buffers": {}})


def _to_torch(layer: Any, base: type[nn.Module], options: dict[str, Any]) -> InPlace:
    settings = _settings(layer)
    # Built to check the options and to read their values.
    ours = _template(_OURS[base], layer, settings | options)
    given = {name: vars(ours)[name] for name in options}
    changed = [f"{name}={value}" for name, value in given.items() if vars(layer)[name] != value]
    if not isinstance(layer, _ConventionBatchNorm):
        return InPlace(layer, type(layer), given, "; ".join(changed))
    if _is_per_activation(layer) and base is not nn.BatchNorm1d:
        raise _RefusedError("its statistics are per activation, and torch's are per channel: pass a callable")
    extras = [name for name in vars(ours) if name not in _torch_attributes()]
    notes = changed + _lost_convention(layer.convention)
    notes += _lost_settings(layer, vars(_OURS[base](1, device="meta")), extras)
    return InPlace(layer, base, dict.fromkeys(extras, Absent) | given, "; ".join(notes))


def _to_ours(layer: Any, base: type[nn.Module], to: str, options: dict[str, Any]) -> InPlace:
    cls = _OURS[base]
    settings = _settings(layer)
    # A process group has no meaning without synchronisation.
    sync = {"sync": True} if to == "sync" else {"sync": False, "process_group": None}
    new = _template(cls, layer, settings | sync | options)
    names = [name for name in vars(new) if name not in _torch_attributes()] + ["eps", "momentum"]
    old = vars(_template(cls, layer, settings))
    changed = {name: vars(new)[name] for name in names if old.get(name, Absent) != vars(new)[name]}
    notes = [f"{name}={_shown(value)}" for name, value in changed.items()]
    attributes = {name: vars(new)[name] for name in names}
    if isinstance(layer, _ConventionBatchNorm):
        attributes, cls = changed, type(layer)
    if base is not nn.BatchNorm1d and _is_per_activation(layer) != _is_per_activation(new):
        raise _RefusedError(
            "its parameters are per channel, and the convention's per activation: build it anew, num_features=C·H·W"
            if _is_per_activation(new)
            else "its parameters are per activation, and the convention's per channel: build the layer anew"
        )
    notes += _kept_constants(layer, new, options)
    return InPlace(layer, cls, attributes, "; ".join(notes))


def _settings(layer: Any) -> dict[str, Any]:
    """Return the constructor's keyword arguments that would build the layer again."""
    names = ["eps", "momentum"]
    if isinstance(layer, _ConventionBatchNorm):
        names += [each.name for each in _own_parameters()]
    return {name: vars(layer)[name] for name in names if name in vars(layer)}


def _own_parameters() -> list[inspect.Parameter]:
    """Return the arguments of our constructor that torch's does not have."""
    parameters = inspect.signature(_ConventionBatchNorm.__init__).parameters.values()
    return [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "bias"]


def _template(cls: type[_ConventionBatchNorm], layer: Any, settings: dict[str, Any]) -> _ConventionBatchNorm:
    """Return a layer like ``layer``, built by our constructor on the meta device."""
    with warnings.catch_warnings():
        # No warning of settings that the layer has already. swap_norm warns once of those it was given.
        warnings.simplefilter("ignore")
        return cls(
            layer.num_features,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
            device="meta",
            **settings,
        )


@cache
def _torch_attributes() -> frozenset[str]:
    return frozenset(vars(nn.BatchNorm1d(1, device="meta")))


def _built(root: nn.Module, layer: Any, build: Callable[..., nn.Module], options: dict[str, Any]) -> Replacement:
    new = build(layer.num_features, **options)
    if not isinstance(new, nn.Module):
        raise ValueError(
            f"to={build!r} returned {new!r} for {layer.num_features} features: it must return a torch.nn.Module."
        )
    like = next((value for value in _tensors(layer) if value.is_floating_point()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    places = [(parent, name) for parent in root.modules() for name in _names_in(parent, layer)]
    return Replacement(layer, new, places)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


def _names_in(parent: nn.Module, child: nn.Module) -> list[str]:
    return [name for name, other in parent._modules.items() if other is child]


def _report_refusals(report: SwapReport, strict: bool) -> None:
    if not report.skipped:
        return
    alike = defaultdict(list)
    for path, reason in report.skipped.items():
        alike[reason].append(_named([path]))
    reasons = "\n".join(f"  {_shortened(paths)}: {reason}" for reason, paths in alike.items())
    if strict:
        raise ValueError(
            f"{len(report.skipped)} batch norm layer(s) cannot be swapped to {report.to}, and nothing has been "
            f"changed; strict=False leaves them as they are.\n{reasons}"
        )
    warnings.warn(f"Batch norm layers that could not be swapped to {report.to}:\n{reasons}", stacklevel=3)


def _apply_all(changes: list[Change]) -> None:
    new = [change.new for change in changes if isinstance(change, Replacement)]
    if len({id(layer) for layer in new}) < len(new):
        raise ValueError("to returned the same module for two layers: it must build one for each.")
    done: list[Change] = []
    try:
        for change in changes:
            change.apply()
            done.append(change)
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise


def _is_per_activation(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "convention", None), "per_activation", False)


def _lost_convention(convention: Convention) -> list[str]:
    """Describe the parts of a convention that torch's layer lacks. eps and momentum are arguments, so they stay."""
    torchs = CONVENTIONS["pytorch"]
    names = [each.name for each in fields(convention) if each.name not in ("eps", "momentum")]
    changed = [
        f"{name} {getattr(convention, name)} -> {getattr(torchs, name)}"
        for name in names
        if getattr(convention, name) != getattr(torchs, name)
    ]
    return [f"convention {convention_name(convention)} becomes torch's: {', '.join(changed)}"] if changed else []


def _lost_settings(layer: Any, usual: dict[str, Any], names: list[str]) -> list[str]:
    """Describe the settings of our layer that torch's does not have and that change its numbers."""
    indifferent = ("convention", "backend", "changes")
    differing = [
        name
        for name in names
        if name not in indifferent and not name.startswith("_") and vars(layer).get(name) != usual.get(name)
    ]
    return [f"{name}={_shown(vars(layer)[name])} is lost" for name in differing]


def _kept_constants(layer: Any, new: _ConventionBatchNorm, options: dict[str, Any]) -> list[str]:
    """Describe the eps and momentum that the layer keeps although the new convention has others."""
    if "convention" not in options:
        return []
    convention = new.convention
    return [
        f"{name}={getattr(layer, name)} kept, {_shown(convention)} has {name}={getattr(convention, name)}"
        for name in ("eps", "momentum")
        if name not in options and getattr(convention, name) not in (None, getattr(layer, name))
    ]


def _shown(value: Any) -> str:
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return convention_name(value) if isinstance(value, Convention) else str(value)


def _named(paths: Iterable[str]) -> str:
    return " = ".join(path or "(the module itself)" for path in paths)


def _shortened(names: list[str], at_most: int = 3) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")
