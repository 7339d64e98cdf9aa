"""A data loader for tensors in memory that shares every batch among the ranks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bnlightning._check import check_integer


def smallest_batch(num_samples: int, batch_size: int, world_size: int) -> int:
    """Return the number of samples in the smallest batch that :class:`TensorBatches` gives to any rank.

    Args:
        num_samples: Number of samples in all.
        batch_size: Number of samples of a step on one rank.
        world_size: Number of ranks.

    Example:
        >>> smallest_batch(num_samples=25, batch_size=10, world_size=1)
        5
    """
    step = batch_size * world_size
    return min(batch_size, (num_samples % step or step) // world_size, num_samples)


class TensorBatches:
    """Consecutive batches of tensors, shared among the ranks. No sample is repeated or dropped.

    All ranks together take ``b = batch_size * world_size`` samples in a step. Step ``i`` takes the samples
    ``[i * b, (i + 1) * b)`` of the epoch's order. Rank ``r`` gets the ``r``-th of ``world_size`` nearly equal parts of
    them. A single process with batch size ``b`` takes the same samples in every step.

    Args:
        tensors: One or more tensors with equally many samples along their first dimension.
        batch_size: Number of samples of a step on one rank.
        rank: Index of this rank, from 0.
        world_size: Number of ranks.
        epoch: Function that returns the number of the epoch. It is called when the first batch of an epoch is taken. By
            default every epoch has the number 0.
        order: Function that returns the order of an epoch from its number: a permutation of the samples' indices, of
            shape ``(num_samples,)``, int64, on the tensors' device. It must be the same on every rank. By default the
            samples keep their order. Batches then are views of the tensors, otherwise copies.

    Raises:
        ValueError: If the tensors do not have equally many samples, or ``batch_size`` is below 1.

    Example:
        >>> x = torch.arange(5)
        >>> [batch for (batch,) in TensorBatches(x, batch_size=2)]
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
        >>> [batch for (batch,) in TensorBatches(x, batch_size=2, rank=1, world_size=2)]
        [tensor([2, 3]), tensor([], dtype=torch.int64)]
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: Callable[[], int] | None = None,
        order: Callable[[int], Tensor] | None = None,
    ) -> None:
        check_integer("batch_size", batch_size, at_least=1)
        numbers = [len(tensor) for tensor in tensors]
        if len(set(numbers)) != 1:
            raise ValueError(f"tensors have {numbers} samples: give one tensor or more, of equally many samples.")
        self.tensors = tensors
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.order = order
        self._served = {"epoch": 0, "served": 0}
        self._resumed = self._served

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.epoch() if self.epoch is not None else 0
        first = self._resumed["served"] if self._resumed["epoch"] == epoch else 0
        self._resumed = {"epoch": epoch, "served": 0}
        batches: Iterator[tuple[Tensor, ...]]
        if self.order is None:
            batches = zip(*(self._shares(tensor, first) for tensor in self.tensors), strict=True)
        else:
            shares = self._shares(self.order(epoch), first)
            batches = (tuple(tensor.index_select(0, share) for tensor in self.tensors) for share in shares)
        for served, batch in enumerate(batches, first + 1):
            self._served = {"epoch": epoch, "served": served}
            yield batch
        self._served = {"epoch": epoch, "served": 0}

    def _shares(self, tensor: Tensor, first: int) -> Iterator[Tensor]:
        """Yield this rank's part of every step's samples, from step ``first`` on."""
        for step in torch.split(tensor, self.batch_size * self.world_size)[first:]:
            yield step.tensor_split(self.world_size)[self.rank] if self.world_size > 1 else step

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches served, so that a resumed run takes the next batch."""
        return dict(self._served)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin after the batches already served, if the next epoch is the one they belong to."""
        # A checkpoint of an epoch's end resumes in the next epoch. If it was made before Lightning closed the epoch, it
        # resumes in the same epoch, and no batch is left there.
        self._resumed = dict(state_dict)
