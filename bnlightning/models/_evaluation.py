"""What all modules have in common: a check of the data, and evaluations logged where they belong."""

from typing import Any

import lightning
from torch import nn


class EvaluatedModule(lightning.LightningModule):
    """A LightningModule around the network ``net``, whose constructor has a ``norm`` among its arguments."""

    net: nn.Module

    def check_data(self, data: Any) -> None:
        """Refuse data that would fail only in some training step.

        Raises:
            ValueError: If ``data.smallest_batch``, where there is one, is 1 and batch normalisation needs two samples.
        """
        norm = self.hparams["norm"]
        if norm != "none" and getattr(data, "smallest_batch", 2) < 2:
            raise ValueError(
                f"batch_size={data.batch_size!r} is not possible with norm={norm!r}: it leaves a batch of one on some "
                "rank, whose variance is 0. Choose another data.batch_size or another number of samples, or "
                "model.norm=none."
            )

    def setup(self, stage: str) -> None:
        """Check the data before training."""
        if stage == "fit":
            self.check_data(getattr(self.trainer, "datamodule", None))

    def log_validation(self, name: str, value: Any, batch_size: int) -> None:
        """Log ``val/<name>``, which :meth:`on_validation_end` writes within a fit."""
        self.log(
            f"val/{name}", value, batch_size=batch_size, sync_dist=True, logger=False if self._is_fitting() else None
        )

    def on_validation_end(self) -> None:
        """Write the evaluation at the number of steps taken: within a fit Lightning's own x-axis is one behind."""
        if self._is_fitting() and not self.trainer.sanity_checking:
            logged = self.trainer.callback_metrics
            metrics = {name: value.item() for name, value in logged.items() if name.startswith("val/")}
            for logger in self.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == "fit"
