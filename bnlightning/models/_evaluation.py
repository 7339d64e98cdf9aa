"""What all modules have in common: a check of the data, losses over ranks, evaluations logged where they belong."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnlightning.nn.moments import world_size


class EvaluatedModule(lightning.LightningModule):
    """A LightningModule around the network ``net``, whose constructor has a ``norm`` among its arguments."""

    net: nn.Module

    def check_data(self, data: Any) -> None:
        """Refuse data that would fail only in some training step.

        Raises:
            ValueError: If ``data.smallest_batch``, where there is one, is 1 and batch normalisation needs two samples:
                with ``sync`` there are as many on other ranks.
        """
        norm = self.hparams["norm"]
        if norm != "none" and getattr(data, "smallest_batch", 2) < 2 and not self._is_synchronised(data):
            raise ValueError(
                f"batch_size={data.batch_size!r} is not possible with norm={norm!r}: it leaves a batch of one on some "
                "rank, whose variance is 0. Choose another data.batch_size or another number of samples, or "
                "model.norm=none."
            )

    def setup(self, stage: str) -> None:
        """Check the data before training."""
        if stage == "fit":
            self.check_data(getattr(self.trainer, "datamodule", None))

    def over_ranks(self, loss: Tensor, samples: int) -> Tensor:
        """The loss to return from ``training_step``, from the mean over the ``samples`` of this rank's batch.

        DDP takes the mean over the ranks of the losses' gradients. Where the ranks' batches differ in size, as they may
        in the last step of an epoch, samples of a smaller one would weigh more; so it weighs less here, and the mean
        over ranks of what is returned is the mean over the samples of all ranks. Every rank must call it: with several,
        it takes a collective of one number.
        """
        if world_size() == 1:
            return loss
        own = torch.tensor(samples, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
        total = own.clone()
        torch.distributed.all_reduce(total)
        # Over no samples it is NaN, and NaN with a weight of 0 would be NaN still.
        return (loss if samples else loss.nan_to_num()) * (own * world_size() / total)

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

    def _is_synchronised(self, data: Any) -> bool:
        """Whether a batch is normalised together with those of other ranks, or may be: no Trainer has the data yet."""
        options = self.hparams.get("norm_options") or {}
        trainer = getattr(data, "trainer", None)
        several = trainer is None or trainer.world_size > 1
        return several and self.hparams["norm"] == "custom" and bool(options.get("sync"))

    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == "fit"


class MeanLoss(Metric):
    """The mean of a loss over all samples, on all ranks, from its means over batches of any size, none included.

    Exact where Lightning's own mean over ranks is not: that divides the number of samples by the number of ranks and
    drops the rest.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, samples: int) -> None:
        """Add a batch of ``samples`` samples and their mean loss, which over none is NaN."""
        if samples:
            # Not in place: it may be in inference mode now, and not the next time.
            self.total = self.total + loss.detach().to(self.total.dtype) * samples
            self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """The mean over all of them."""
        return self.total / self.samples
