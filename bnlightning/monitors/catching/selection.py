"""Which modules a monitor watches, and what is known of them before they run."""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules import activation as torch_activations
from torch.nn.modules import dropout, flatten, padding, pooling, upsampling
from torch.nn.modules import normalization as torch_normalizations
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bnlightning._check import by_import_path, is_function_of_two
from bnlightning.nn.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from bnlightning.nn.networks import get_act_layer

Choice = str | type[nn.Module] | Callable[[str, nn.Module], bool]

_TORCH_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(torch_activations, name) for name in torch_activations.__all__ if name != "MultiheadAttention"
)
_FUSED = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)
ACTIVATION_TYPES: tuple[type[nn.Module], ...] = (*_TORCH_ACTIVATIONS, *_FUSED)
NORM_TYPES: tuple[type[nn.Module], ...] = (
    _NormBase,
    *(getattr(torch_normalizations, name) for name in torch_normalizations.__all__),
)
# What the names of classes say that are not torch's own, such as RMSNorm, LayerNorm2d, NewGELUActivation or QuickGELU.
_NORM_NAME = re.compile(r"(Norm|_norm)(alization|alisation)?(\dd)?(Fp\d+)?$")
_ACTIVATION_WORDS = (
    *("ReLU", "ReLu", "Relu", "RELU", "GELU", "GeLU", "Gelu", "SiLU", "SiLu", "Silu", "SELU", "CELU", "ELU", "Elu"),
    *("GLU", "Glu", "Swish", "Mish", "Tanh", "Sigmoid", "Softmax", "Softplus", "SoftPlus", "Softsign"),
    *("Activation", "Act"),
)
# A word ends before a capital, a digit or nothing: an ActionHead is no activation.
_ACTIVATION_NAME = re.compile(rf"({'|'.join(_ACTIVATION_WORDS)})(?![a-z])")
_NO_ACTIVATION_NAME = re.compile(r"Loss|Criterion|Metric|Embed|Norm$")
# Packages whose modules are no layers.
_NO_LAYERS = ("torch.", "torchmetrics.", "lightning.", "pytorch_lightning.")
_MAX_PATHS = 16
# Their values are still to be activated. A unit that is negative there, for example, is at rest behind a ReLU.
_PRE_ACTIVATION_TYPES = (*NORM_TYPES, _ConvNd, nn.Linear, nn.Bilinear)
# They turn finite values into finite values, except for the very largest floats.
_FINITE_TYPES: tuple[type[nn.Module], ...] = (
    *(kind for kind in _TORCH_ACTIVATIONS if kind is not nn.PReLU),
    nn.Identity,
    *(
        getattr(module, name)
        for module in (dropout, flatten, padding, pooling, upsampling)
        for name in module.__all__
    ),
)  # fmt: skip
_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
# Wrappers that torch puts around modules, not the user.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def saturation_limits(module: nn.Module) -> tuple[float, float] | None:
    """The outputs beyond which an activation counts as saturated, or ``None`` for an unbounded one.

    | activation | limits | why |
    |---|---|---|
    | tanh | -0.99 and 0.99 | the slope is below 0.02 beyond them |
    | sigmoid | 0.01 and 0.99 | the slope is below 0.01 beyond them |
    | hardtanh, hardsigmoid | both bounds | the slope is zero there |
    | relu6 | the upper bound | the slope is zero there, and an output of 0 is rest, not saturation |
    """
    if isinstance(module, _FUSED):
        return saturation_limits(get_act_layer(module.activation)())
    if isinstance(module, nn.Tanh):
        return -0.99, 0.99
    if isinstance(module, nn.Sigmoid):
        return 0.01, 0.99
    tiny = torch.finfo(torch.float32).eps
    if isinstance(module, nn.ReLU6):
        return -torch.inf, 6.0 * (1 - tiny)
    if isinstance(module, nn.Hardtanh):
        span = (module.max_val - module.min_val) * tiny
        return module.min_val + span, module.max_val - span
    if isinstance(module, nn.Hardsigmoid):
        return tiny, 1.0 - tiny
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: one of torch's, ours, or one whose class is named so."""
    return isinstance(module, NORM_TYPES) or (_is_foreign_leaf(module) and bool(_NORM_NAME.search(_class(module))))


def is_named_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: one of torch's, ours, or one whose class is named so.

    A class with a matrix of weights is none, whatever its name: it does more than activate.
    """
    if isinstance(module, ACTIVATION_TYPES):
        return True
    name = _class(module)
    return (
        _is_foreign_leaf(module)
        and bool(_ACTIVATION_NAME.search(name))
        and not _NO_ACTIVATION_NAME.search(name)
        and not any(parameter.dim() > 1 for parameter in module.parameters())
    )


def is_unknown(module: nn.Module) -> bool:
    """Whether nothing tells what a module of the user's is: it has no submodules, and no name that says so."""
    return _is_foreign_leaf(module) and not (
        isinstance(module, (*ACTIVATION_TYPES, *_PRE_ACTIVATION_TYPES, *_FINITE_TYPES))
        or is_norm(module)
        or is_named_activation(module)
    )


def is_activation(module: nn.Module) -> bool:
    """Whether dead and dormant units count under ``health/``: for activations and for modules not of torch."""
    if is_named_activation(module):
        return True
    return not _is_pre_activation(module) and not type(module).__module__.startswith("torch.nn.")


def has_units(module: nn.Module) -> bool:
    """Whether single units are looked at. In front of the activation they are not."""
    return is_named_activation(module) or not _is_pre_activation(module)


def _is_pre_activation(module: nn.Module) -> bool:
    return isinstance(module, _PRE_ACTIVATION_TYPES) or is_norm(module)


def _is_foreign_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and not type(module).__module__.startswith(_NO_LAYERS)


def _class(module: nn.Module) -> str:
    return type(module).__name__


def may_overflow(module: nn.Module) -> bool:
    """Whether a module without submodules could turn finite values into a non-finite one."""
    return not isinstance(module, _FINITE_TYPES)


def features(module: nn.Module) -> tuple[int, bool] | None:
    """The number of features a layer puts out, and whether they are in dimension 1 instead of the last.

    ``None`` if the layer does not tell.
    """
    for name in ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim"):
        number = getattr(module, name, None)
        if isinstance(number, int):
            return number, isinstance(module, _CHANNELS_FIRST)
    shape = getattr(module, "normalized_shape", None)
    last = shape[-1] if isinstance(shape, tuple | list) and shape else shape
    return (last, False) if isinstance(last, int) else None


def unit_dim(shape: Sequence[int], layer: tuple[int, bool] | None) -> int:
    """The dimension of the units: that of the features of the layer before.

    The layer may not tell, or neither dimension 1 nor the last may have its size. The units are then dimension 1, the
    channels, for an output of four or more dimensions. Otherwise they are the last dimension.

    Args:
        shape: Shape of the output.
        layer: :func:`features` of the last layer that ran. ``None``: it does not tell.
    """
    last = len(shape) - 1
    if last < 2:
        return last
    if layer is not None:
        number, first = layer
        found = [dim for dim in ((1, last) if first else (last, 1)) if shape[dim] == number]
        if found:
            return found[0]
    return 1 if last > 2 else last


def checked_choices(modules: Choice | Sequence[Choice] | None) -> list[Choice] | None:
    """The ``modules`` argument of a monitor as a list.

    Raises:
        ValueError: If an entry is neither a type of modules nor a pattern nor a function.
    """
    if modules is None:
        return None
    chosen = [modules] if isinstance(modules, str) or not isinstance(modules, Sequence) else list(modules)
    chosen = [by_import_path(entry, _is_rule) for entry in chosen]
    for entry in chosen:
        is_module_type = _is_module_type(entry)
        is_function = callable(entry) and not isinstance(entry, type | nn.Module)
        if not (isinstance(entry, str) or is_module_type or is_function):
            raise ValueError(
                f"modules={modules!r} is not possible: give types of modules, patterns of paths such as 'net.*', or "
                "functions of a path and a module."
            )
    return chosen


def _is_rule(entry: object) -> bool:
    return _is_module_type(entry) or is_function_of_two(entry)


def _is_module_type(entry: object) -> bool:
    return isinstance(entry, type) and issubclass(entry, nn.Module)


def is_chosen(choices: Sequence[Choice] | None, name: str, module: nn.Module) -> bool:
    """Whether a module is watched. One with submodules is chosen only by its type, its exact path or a function."""
    is_leaf = next(module.children(), None) is None
    if choices is None:
        return is_leaf and (is_named_activation(module) or is_norm(module))
    return any(_matches(choice, name, module, is_leaf) for choice in choices)


def _matches(choice: Choice, name: str, module: nn.Module, is_leaf: bool) -> bool:
    if isinstance(choice, str):
        return name == choice or (is_leaf and fnmatchcase(name, choice))
    if isinstance(choice, type):
        return isinstance(module, choice)
    return bool(choice(name, module))


def modules_by_path(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Every module once, in the order of ``named_modules``, with all its paths. The first is that of ``named_modules``.

    A module that is shared has several, at most 16.
    """
    paths: dict[nn.Module, list[str]] = {}
    _walk(module, "", paths, ())
    for name, one in module.named_modules():
        yield list(dict.fromkeys([user_path(name), *map(user_path, paths.get(one, []))])), one


def _walk(module: nn.Module, path: str, paths: dict[nn.Module, list[str]], above: tuple[nn.Module, ...]) -> None:
    known = paths.setdefault(module, [])
    # A module may hold one that holds it.
    if len(known) >= _MAX_PATHS or any(module is one for one in above):
        return
    known.append(path)
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{path}.{name}" if path else name, paths, (*above, module))


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter. The CPU if it has none."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def user_path(name: str) -> str:
    """A module's path as its author wrote it, without the wrappers of torch.compile, FSDP and checkpointing."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
