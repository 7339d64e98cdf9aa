"""Parameters by their paths in a model as its author wrote it, whatever wraps its modules for the training."""

from collections.abc import Iterator

from torch import nn

# By the names of their classes: importing some of them takes seconds.
_WRAPPED_AS = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}


def parameters_by_path(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters in the order of the modules; one that is shared stands under its first path only."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for path, parameter in _parameters(module, "", set()):
        first.setdefault(id(parameter), (path, parameter))
    return dict(first.values())


def _parameters(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    seen.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield path + name, parameter
    wrapped = _wrapped_as(module)
    for name, child in module.named_children():
        if id(child) not in seen:
            yield from _parameters(child, path if name == wrapped else f"{path}{name}.", seen)


def _wrapped_as(module: nn.Module) -> str | None:
    """The name of the child that ``module`` does nothing but wrap, if it does."""
    return next((_WRAPPED_AS[base.__name__] for base in type(module).__mro__ if base.__name__ in _WRAPPED_AS), None)
