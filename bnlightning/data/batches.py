"""Batches served from tensors in memory."""

from collections.abc import Iterator

from torch import Tensor


class TensorBatches:
    """Consecutive batches of tensors, divided among the ranks without repeating or dropping a sample.

    Step ``i`` takes the samples ``[i * b, (i + 1) * b)`` with ``b = batch_size * world_size``, and rank ``r`` of them
    the ``r``-th of ``world_size`` nearly equal parts: what a single process would take with ``b`` as its batch size.

    Args:
        tensors: One or more, with the samples along their first dimension, equally many.
        batch_size: Samples of a step on one rank.
        rank: This process's.
        world_size: Number of processes.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.world_size == 1:
            yield from zip(*(tensor.split(self.batch_size) for tensor in self.tensors), strict=True)
            return
        for step in zip(*(tensor.split(self.batch_size * self.world_size) for tensor in self.tensors), strict=True):
            yield tuple(part.tensor_split(self.world_size)[self.rank] for part in step)
