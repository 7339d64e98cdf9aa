"""Batches served from tensors in memory."""

from collections.abc import Iterator

from torch import Tensor


def smallest_batch(num_samples: int, batch_size: int, world_size: int) -> int:
    """Samples of the smallest batch on any rank, of those that :class:`TensorBatches` makes."""
    step = batch_size * world_size
    return min(batch_size, (num_samples % step or step) // world_size, num_samples)


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
        self._served = 0
        self._first = 0

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        first, self._first = self._first, 0
        steps = [tensor.split(self.batch_size * self.world_size) for tensor in self.tensors]
        for index in range(first, len(self)):
            self._served = index + 1
            parts = (step[index] for step in steps)
            yield tuple(
                part.tensor_split(self.world_size)[self.rank] if self.world_size > 1 else part for part in parts
            )
        self._served = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch have been served, so that a checkpoint amid an epoch resumes at the next."""
        return {"served": self._served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next epoch, and only that, after the batches already served."""
        self._first = state_dict["served"]
