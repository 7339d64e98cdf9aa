"""A data module of noisy points on a parabola."""

from typing import Any

import lightning
import numpy as np
import torch

from bnlightning._check import check_integer, check_number
from bnlightning.data.batches import TensorBatches, smallest_batch


class SyntheticRegressionDataModule(lightning.LightningDataModule):
    """Points on the parabola y = x² - 5 with normal noise.

    Training takes the points in one fixed order, the same in every epoch. Evaluation takes all points in one batch;
    there is no split. The seed decides the points. They are the points of the published scripts:
    ``numpy.random.seed(seed)``, then linspace, shuffle and normal.

    Args:
        num_points: Number of points, evenly spaced in x.
        x_min: Smallest x.
        x_max: Largest x.
        noise_std: Standard deviation of the noise on y.
        shuffle: Whether to shuffle the points once. Otherwise x increases.
        batch_size: Number of points of a training step on one rank. ``None`` takes all points.
        seed: Seed of the order and the noise, from 0 to 2**32 - 1.

    Attributes:
        x: Tensor of all x in the order of training, shape ``(num_points, 1)``, float32. Set by :meth:`setup`.
        y: Tensor of all y, of the same shape and dtype. Set by :meth:`setup`.

    Shape:
        Batches ``(x, y)``: both of shape ``(N, 1)``, float32.

    Raises:
        ValueError: If an argument is out of range. In the data loaders, if a rank would get an empty last batch.

    Example:
        >>> data = SyntheticRegressionDataModule(num_points=100, batch_size=10)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), data.x.shape
        (10, torch.Size([100, 1]))
    """

    def __init__(
        self,
        num_points: int = 2500,
        x_min: float = -7.0,
        x_max: float = 10.0,
        noise_std: float = 8.0,
        shuffle: bool = True,
        batch_size: int | None = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("num_points", num_points, at_least=2)
        check_number("x_min", x_min)
        check_number("x_max", x_max, above=x_min)
        check_number("noise_std", noise_std, at_least=0.0)
        check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
        if batch_size is not None:
            check_integer("batch_size", batch_size, at_least=1)
        self.save_hyperparameters()
        self.num_points = num_points
        self.batch_size = batch_size if batch_size is not None else num_points

    @property
    def smallest_batch(self) -> int:
        """Number of points in the smallest training batch of any rank."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return smallest_batch(self.num_points, self.batch_size, world_size)

    def target(self, x: Any) -> Any:
        """Return y without noise for a float64 numpy array of x. Override this method for another curve."""
        return x**2 - 5

    def setup(self, stage: str) -> None:
        """Make the points, the same on every rank."""
        hparams = self.hparams
        # The legacy generator, because the published scripts use its stream.
        rng = np.random.RandomState(hparams["seed"])
        x = np.linspace(hparams["x_min"], hparams["x_max"], hparams["num_points"])
        if hparams["shuffle"]:
            rng.shuffle(x)
        y = self.target(x) + rng.normal(0.0, hparams["noise_std"], x.shape)
        self.x = torch.as_tensor(x, dtype=torch.float32)[:, None]
        self.y = torch.as_tensor(y, dtype=torch.float32)[:, None]

    def train_dataloader(self) -> TensorBatches:
        """Return batches of ``batch_size`` points a rank, in the points' order."""
        return self._batches(self.batch_size)

    def val_dataloader(self) -> TensorBatches:
        """Return all points in one batch, shared among the ranks."""
        return self._batches(len(self.x))

    def _batches(self, batch_size: int) -> TensorBatches:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if self.smallest_batch < 1:
            raise ValueError(
                f"num_points={len(self.x)} is not possible with batch_size={self.batch_size} on {world_size} ranks: "
                "one rank would get an empty last batch. Choose another data.num_points or data.batch_size."
            )
        epoch = None if trainer is None else lambda: trainer.current_epoch
        return TensorBatches(self.x, self.y, batch_size=batch_size, rank=rank, world_size=world_size, epoch=epoch)
