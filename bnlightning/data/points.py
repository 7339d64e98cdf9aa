"""A data module of points that are given one by one."""

from collections.abc import Sequence

import lightning
import torch

from bnlightning._check import check_integer
from bnlightning.data.batches import TensorBatches, smallest_batch


class PointsDataModule(lightning.LightningDataModule):
    """Points given one by one, in that order, for training, validation and test.

    Args:
        x: One row of numbers for each point, such as ``[[0.0], [1.0]]``.
        y: One row of numbers for each point's target.
        batch_size: Number of points of a training step on one rank. ``None``, the default, takes all points.

    Attributes:
        x: Tensor of shape ``(num_points, features)``, float32.
        y: Tensor of shape ``(num_points, targets)``, float32.

    Shape:
        Batches ``(x, y)``: of shape ``(N, features)`` and ``(N, targets)``, float32.

    Raises:
        ValueError: If x and y are not equally many rows of numbers, or ``batch_size`` is below 1.

    Example:
        >>> data = PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
        >>> x, y = next(iter(data.train_dataloader()))
        >>> y
        tensor([[3.],
                [4.]])
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
        """Number of points in the smallest training batch of any rank."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return smallest_batch(self.num_points, self.batch_size, world_size)

    def train_dataloader(self) -> TensorBatches:
        """Return batches of ``batch_size`` points a rank, in the points' order."""
        return self._batches(self.batch_size)

    def val_dataloader(self) -> TensorBatches:
        """Return all points in one batch, shared among the ranks."""
        return self._batches(self.num_points)

    def test_dataloader(self) -> TensorBatches:
        """Return the same as :meth:`val_dataloader`."""
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
