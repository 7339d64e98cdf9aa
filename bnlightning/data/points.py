"""Points given one by one."""

from collections.abc import Sequence

import lightning
import torch

from bnlightning._check import check_integer
from bnlightning.data.batches import TensorBatches, smallest_batch


class PointsDataModule(lightning.LightningDataModule):
    """The points one gives, in that order, for training, for evaluation and for the test.

    Args:
        x: One row of numbers a point, such as ``[[0.0], [1.0]]``.
        y: Its target, likewise.
        batch_size: Points of a training step on one rank; ``None`` takes all of them.

    Attributes:
        x: Shape ``(num_points, features)``, float32.
        y: Likewise, its own features.

    Shape:
        Batches ``(x, y)`` of ``(N, features)`` each, float32.

    Raises:
        ValueError: If x and y are not equally many rows of numbers, or ``batch_size`` is below 1.

    Example:
        >>> data = PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
    """

    def __init__(
        self, x: Sequence[Sequence[float]], y: Sequence[Sequence[float]], batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.x, self.y = _points("x", x), _points("y", y)
        if len(self.x) != len(self.y):
            raise ValueError(f"x has {len(self.x)} points and y has {len(self.y)}: give one row of y for each of x.")
        if batch_size is not None:
            check_integer("batch_size", batch_size, at_least=1)
        self.save_hyperparameters()
        self.num_points = len(self.x)
        self.batch_size = batch_size if batch_size is not None else self.num_points

    @property
    def smallest_batch(self) -> int:
        """Points of the smallest training batch on any rank."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return smallest_batch(self.num_points, self.batch_size, world_size)

    def train_dataloader(self) -> TensorBatches:
        """Batches of ``batch_size`` points a rank, in the points' order."""
        return self._batches(self.batch_size)

    def val_dataloader(self) -> TensorBatches:
        """All points in one batch, divided among the ranks."""
        return self._batches(self.num_points)

    def test_dataloader(self) -> TensorBatches:
        """The same as :meth:`val_dataloader`."""
        return self._batches(self.num_points)

    def _batches(self, batch_size: int) -> TensorBatches:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        epoch = None if trainer is None else lambda: trainer.current_epoch
        return TensorBatches(self.x, self.y, batch_size=batch_size, rank=rank, world_size=world_size, epoch=epoch)


def _points(name: str, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    try:
        points = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={rows!r} is not possible: give rows of numbers, such as [[0.0], [1.0]].") from error
    if points.dim() != 2 or points.numel() == 0:
        raise ValueError(f"{name}={rows!r} is not possible: give rows of numbers, such as [[0.0], [1.0]].")
    return points
