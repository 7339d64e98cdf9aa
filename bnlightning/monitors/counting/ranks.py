"""The only code of the monitors that communicates between ranks.

Only sums and maxima are reduced, packed into few tensors. A sample therefore takes a constant number of collectives, in
the same order on every rank. It does not matter how many modules there are, nor which of them ran on a rank.
"""

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found", bound=tuple[Any, ...])


def world_size() -> int:
    """The number of ranks that reduce together. 1 without a process group."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone."""
    return world_size() == 1 or torch.distributed.get_rank() == 0


def all_keys(own: Sequence[Key], device: torch.device) -> list[Key]:
    """The keys that any rank has, in the same order on every rank: rank 0's in its order, then rank 1's others.

    It takes one small collective if all ranks have the same keys, as nearly always. Otherwise rank 0 broadcasts its
    keys, and the keys that it lacks are gathered. To gather all keys of thousands of ranks would take gigabytes on
    each. Every rank must call it.

    Args:
        own: The keys of this rank, each once. They are told apart by their ``repr``.
        device: The device that the process group works on.
    """
    if world_size() == 1:
        return list(own)
    digest = crc32(repr(list(own)).encode())
    bounds = torch.tensor([digest, -digest], device=device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    if bounds[0] == -bounds[1]:
        return list(own)
    of_first = [list(own)]
    torch.distributed.broadcast_object_list(of_first, src=0)
    known = set(of_first[0])
    gathered: list[list[Key]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(gathered, [key for key in own if key not in known])
    return list(dict.fromkeys(key for keys in (*of_first, *gathered) for key in keys))


def first_of_ranks(own: Found | None, device: torch.device) -> Found | None:
    """The smallest of what the ranks have, the same on every rank.

    It takes one small collective, and a second one if any rank has something. Every rank must call it.

    Args:
        own: What this rank has, a tuple that can be ordered. ``None``: nothing.
        device: The device of the collectives.
    """
    if world_size() == 1:
        return own
    (none_has,) = reduce_minima([torch.tensor(own is None, device=device, dtype=torch.int64)])
    if none_has:
        return None
    gathered: list[Found | None] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, own)
    return min(found for found in gathered if found is not None)


def reduce_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the ranks. With one rank they are the tensors themselves.

    It takes one collective for each dtype among ``tensors``, in the order of first occurrence. Every rank must call it.

    Args:
        tensors: Any tensors. Shapes and dtypes must be the same on all ranks.
    """
    return _reduce(tensors, "SUM")


def reduce_maxima(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The maxima over the ranks, as :func:`reduce_sums`. NaN among the values is undefined on some backends."""
    return _reduce(tensors, "MAX")


def reduce_minima(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The minima over the ranks, as :func:`reduce_sums`."""
    return _reduce(tensors, "MIN")


def _reduce(tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
    if world_size() == 1:
        return list(tensors)
    reduced: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        packed = torch.cat([tensors[index].flatten() for index in indices])
        torch.distributed.all_reduce(packed, op=getattr(torch.distributed.ReduceOp, operation))
        parts = torch.split(packed, [tensors[index].numel() for index in indices])
        reduced |= {index: part.view_as(tensors[index]) for index, part in zip(indices, parts, strict=True)}
    return [reduced[index] for index in range(len(tensors))]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank may hold a part."""
    # Not by the class: its import takes long.
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor, like: Tensor | None = None) -> Tensor | None:
    """The values that this rank adds to a sum over all values of ``tensor``, so that each value counts once.

    A DTensor gives the values that this rank holds, unless they are replicas of another rank's. Any other tensor is
    taken to be the same on all ranks, and the first rank gives it. ``None``: this rank adds nothing.

    Args:
        tensor: Any tensor. With ``like``, a DTensor is first brought to the layout of ``like``, which may communicate.
        like: A tensor of the same shape, a DTensor if ``tensor`` is one. ``None``: the layout stays.
    """
    if not is_sharded(tensor):
        return tensor if is_first_rank() else None
    sharded: Any = tensor
    placements: Any = sharded.placements if like is None else like.placements  # type: ignore[attr-defined]
    if placements != sharded.placements:
        sharded = sharded.redistribute(placements=placements)
    coordinate = sharded.device_mesh.get_coordinate()
    if coordinate is None or any(
        place > 0 and placement.is_replicate() for place, placement in zip(coordinate, placements, strict=True)
    ):
        return None
    part = sharded.to_local()
    return part if part.numel() > 0 else None
