"""Batches served from tensors in memory."""

from collections.abc import Callable, Iterator

from torch import Tensor


def smallest_batch(num_samples: int, batch_size: int, world_size: int) -> int:
    """Samples of the smallest batch on any rank, of those that :class:`TensorBatches` makes."""
    step = batch_size * world_size
    return min(batch_size, (num_samples % step or step) // world_size, num_samples)


class TensorBatches:
    """Consecutive batches of tensors, divided among the ranks without repeating or dropping a sample.

    Step ``i`` takes the samples ``[i * b, (i + 1) * b)`` of the epoch's order, with ``b = batch_size * world_size``,
    and rank ``r`` of them the ``r``-th of ``world_size`` nearly equal parts: what a single process would take with
    ``b`` as its batch size.

    Args:
        tensors: One or more, with the samples along their first dimension, equally many.
        batch_size: Samples of a step on one rank.
        rank: This process's.
        world_size: Number of processes.
        epoch: Called when an epoch's first batch is taken: its number. ``None`` is 0 in every one.
        order: Called with that number, and the same on every rank: a permutation of the samples' indices, shape
            ``(num_samples,)``, int64, on the tensors' device. ``None`` is the tensors' own order, of which batches are
            views; others are copies.
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
        """This rank's part of every step's samples, from step ``first`` on."""
        for step in tensor.split(self.batch_size * self.world_size)[first:]:
            yield step.tensor_split(self.world_size)[self.rank] if self.world_size > 1 else step

    def state_dict(self) -> dict[str, int]:
        """How many batches of which epoch have been served, so that a checkpoint amid it resumes at the next."""
        return dict(self._served)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin after the batches already served, unless what begins next is another epoch."""
        # A checkpoint of an epoch's end resumes in the next or, when it was made before Lightning closed the epoch, in
        # the same one, of which nothing is left then.
        self._resumed = dict(state_dict)
