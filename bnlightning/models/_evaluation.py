"""The common part of all modules: the check of the data, losses over ranks, and the logging of evaluations."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnlightning.nn.moments import world_size


class EvaluatedModule(lightning.LightningModule):
    """A LightningModule around the network ``net``. Its constructor must have an argument ``norm``."""

    net: nn.Module

    def check_data(self, data: Any) -> None:
        """Refuse data that would fail in some later training step.

        Args:
            data: A data module, or ``None``. Only its attribute ``smallest_batch`` is checked, if it has one.

        Raises:
            ValueError: If the smallest batch of a rank has one sample. Batch normalisation needs two, unless ``sync``
                adds the samples of other ranks.
        """
        norm = self.hparams["norm"]
        if norm != "none" and getattr(data, "smallest_batch", 2) < 2 and not self._is_synchronised(data):
            raise ValueError(
                f"batch_size={data.batch_size!r} is not possible with norm={norm!r}: it leaves a batch of one on some "
                "rank, whose variance is 0. Choose another data.batch_size or another number of samples, or "
                "model.norm=none."
            )

    def setup(self, stage: str) -> None:
        """Check the data before a fit."""
        if stage == "fit":
            self.check_data(getattr(self.trainer, "datamodule", None))

    def over_ranks(self, loss: Tensor, samples: int) -> Tensor:
        """Return the loss for ``training_step`` to return, weighted by this rank's number of samples.

        DDP averages the gradients of the ranks' losses. If the batches differ in size, as in the last step of an epoch,
        the samples of a smaller batch would weigh more. The weight corrects this: the mean of the returned losses over
        the ranks is the mean over the samples of all ranks. Every rank must call it. With several ranks it takes one
        collective of one number.

        Args:
            loss: Mean loss over this rank's batch, without dimensions.
            samples: Number of samples in this rank's batch. It may be 0.

        Returns:
            The weighted loss, without dimensions.
        """
        if world_size() == 1:
            return loss
        own = torch.tensor(samples, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
        total = own.clone()
        torch.distributed.all_reduce(total)
        # The mean over no samples is NaN, and NaN times a weight of 0 is NaN too.
        return (loss if samples else loss.nan_to_num()) * (own * world_size() / total)

    def log_validation(self, name: str, value: Any, batch_size: int) -> None:
        """Log ``val/<name>``. Within a fit :meth:`on_validation_end` writes it to the loggers."""
        self.log(
            f"val/{name}", value, batch_size=batch_size, sync_dist=True, logger=False if self._is_fitting() else None
        )

    def on_validation_end(self) -> None:
        """Write the evaluation of a fit at the number of steps taken. Lightning would write it one step earlier."""
        if self._is_fitting() and not self.trainer.sanity_checking:
            logged = self.trainer.callback_metrics
            metrics = {name: value.item() for name, value in logged.items() if name.startswith("val/")}
            for logger in self.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def _is_synchronised(self, data: Any) -> bool:
        """Whether a batch is normalised together with those of other ranks. Without a Trainer it may be: ``True``."""
        options = self.hparams.get("norm_options") or {}
        trainer = getattr(data, "trainer", None)
        several = trainer is None or trainer.world_size > 1
        return several and self.hparams["norm"] == "custom" and bool(options.get("sync"))

    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == "fit"


class MeanLoss(Metric):
    """The mean of a loss over all samples on all ranks, from its means over batches of any size, even empty ones.

    It is exact. Lightning's own mean over ranks is not: it divides the number of samples by the number of ranks and
    drops the remainder.

    Example:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor(1.0), samples=1)
        >>> metric.update(torch.tensor(4.0), samples=2)
        >>> metric.compute()
        tensor(3.)
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, samples: int) -> None:
        """Add a batch of ``samples`` samples with the mean loss ``loss``. A batch without samples adds nothing."""
        if samples:
            # Not in place: this call may be in inference mode and the next one not.
            self.total = self.total + loss.detach().to(self.total.dtype) * samples
            self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """Return the mean loss over all samples added."""
        return self.total / self.samples
