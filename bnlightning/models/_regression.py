"""What the regressions have in common."""

from contextlib import nullcontext
from typing import Any

import lightning
from torch import Tensor, nn
from torch.nn import functional as F

from bnlightning.nn import batch_statistics


class RegressionSteps(lightning.LightningModule):
    """The steps of a regression by the network ``net``, whose constructor has a ``norm`` among its arguments."""

    net: nn.Module

    def check_data(self, data: Any) -> None:
        """Refuse data that would fail only in some training step.

        Raises:
            ValueError: If ``data.smallest_batch``, where there is one, is 1 and batch normalisation needs two points.
        """
        norm = self.hparams["norm"]
        if norm != "none" and getattr(data, "smallest_batch", 2) < 2:
            raise ValueError(
                f"batch_size={data.batch_size!r} is not possible with norm={norm!r}: of {data.num_points} points it "
                "leaves a batch of one on some rank, whose variance is 0. Choose another data.batch_size or another "
                "number of points, or model.norm=none."
            )

    def setup(self, stage: str) -> None:
        """Check the data before training."""
        if stage == "fit":
            self.check_data(getattr(self.trainer, "datamodule", None))

    def forward(self, x: Tensor) -> Tensor:
        """The network's y for ``x``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of one batch."""
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("train/loss", loss, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The mean squared error of one evaluated batch, and the prediction for it."""
        x, y = batch
        with batch_statistics(self.net) if self.hparams.get("eval_statistics") == "batch" else nullcontext():
            prediction = self(x)
        loss = F.mse_loss(prediction, y)
        self.log("val/loss", loss, batch_size=len(x), sync_dist=True, logger=False if self._is_fitting() else None)
        return {"loss": loss, "prediction": prediction}

    def on_validation_end(self) -> None:
        """Write ``val/loss`` at the number of steps taken: within a fit Lightning's own x-axis is one behind."""
        if self._is_fitting() and not self.trainer.sanity_checking:
            loss = self.trainer.callback_metrics["val/loss"].item()
            for logger in self.loggers:
                logger.log_metrics({"val/loss": loss}, step=self.global_step)

    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == "fit"
