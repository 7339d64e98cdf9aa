"""The steps that all regressions share."""

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F

from bnlightning.models._evaluation import EvaluatedModule, MeanLoss
from bnlightning.nn import batch_statistics


class RegressionSteps(EvaluatedModule):
    """Training and validation of a regression by the mean squared error.

    Logs:
        ``train/loss``: mean squared error of the batch over the points of all ranks, before the optimizer step.
        ``val/loss``: mean squared error over all evaluated points on all ranks. It is logged at the number of optimizer
        steps taken before the evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.val_loss = MeanLoss()

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's prediction for ``x``."""
        prediction: Tensor = self.net(x)
        return prediction

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error of one batch."""
        x, y = batch
        loss = self.over_ranks(F.mse_loss(self(x), y), len(x))
        self.log("train/loss", loss, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the mean squared error of one evaluated batch as ``loss``, and the ``prediction`` for it."""
        x, y = batch
        with batch_statistics(self.net) if self.hparams.get("eval_statistics") == "batch" else nullcontext():
            prediction = self(x)
        loss = F.mse_loss(prediction, y)
        self.val_loss.update(loss, len(x))
        self.log_validation("loss", self.val_loss, len(x))
        return {"loss": loss, "prediction": prediction}
