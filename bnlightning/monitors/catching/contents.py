"""The tensors in what modules take and put out, and those of their values that can be counted."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnlightning.monitors.catching.plain import plain

_MAX_DEPTH = 4


class UnreadableError(Exception):
    """A tensor whose values cannot be counted; the message says of which kind it is."""


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of a tensor, ready to be counted.

    Args:
        x: A dense floating tensor. A complex number is two values, in a last dimension of size 2.
        shape: The shape of the tensor without that last dimension.
        lengths: Number of rows of each sample, where the first dimension is not the samples.
    """

    x: Tensor
    shape: tuple[int, ...]
    lengths: tuple[int, ...] | None = None


def tensors_in(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The floating and complex tensors in ``value``, each with its place.

    The place is ``""`` for a plain tensor, otherwise such as ``":1.0"`` or ``":logits"``. Tuples, lists, mappings,
    dataclasses and classes of attrs are looked into, four levels deep. A member that cannot be read is passed over.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield path, value
        return
    if depth == _MAX_DEPTH:
        return
    for name, member in _members(value):
        yield from tensors_in(member, f"{path}.{name}" if path else f":{name}", depth + 1)


def values_of(x: Tensor) -> Values:
    """The values of a tensor. Of a nested tensor those of all its parts, without padding.

    Raises:
        UnreadableError: If they cannot be counted: the tensor is sparse, quantised, masked or on no device, say.
    """
    kind = type(x).__name__
    # By name, because importing these classes takes long.
    if kind == "MaskedTensor":
        raise UnreadableError("a masked tensor")
    own = plain(x)
    if own is None:
        raise UnreadableError(f"a {kind}, which only its own operations can read")
    x = own
    if x.is_nested:
        return _of_parts(x)
    if x.is_quantized:
        raise UnreadableError("a quantised tensor")
    if x.layout is not torch.strided:
        raise UnreadableError("a sparse tensor" if x.is_sparse or "sparse" in str(x.layout) else f"{x.layout}")
    if x.is_meta:
        raise UnreadableError("a tensor without values, on the meta device")
    x = x.detach()
    if not x.is_complex():
        return Values(x, tuple(x.shape))
    x = torch.view_as_real((x if x.dim() > 1 else x.reshape(-1, 1)).resolve_conj())
    return Values(x, tuple(x.shape[:-1]))


def _of_parts(x: Tensor) -> Values:
    every = x.detach().unbind()
    parts = [part for part in every if part.numel()]
    if not parts or parts[0].dim() == 0 or len({part.shape[1:] for part in parts}) > 1 or parts[0].is_complex():
        raise UnreadableError("a nested tensor whose parts differ in more than their first dimension")
    together = torch.cat(parts)
    return Values(together, tuple(together.shape), lengths=tuple(len(part) if part.numel() else 0 for part in every))


def _members(value: Any) -> list[tuple[Any, Any]]:
    try:
        if isinstance(value, Mapping):
            return list(value.items())
        if isinstance(value, tuple | list):
            return list(enumerate(value))
    except Exception:
        # A container of the user's own may fail at anything. Training must not.
        return []
    if isinstance(value, type):
        return []
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    names += [each.name for each in getattr(type(value), "__attrs_attrs__", ())]
    return [(name, member) for name in names if (member := _member(value, name)) is not None]


def _member(value: Any, name: str) -> Any:
    try:
        return getattr(value, name)
    except Exception:
        # A field may be unset, or a property that fails.
        return None
