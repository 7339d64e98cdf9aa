"""What the regressions have in common."""

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F

from bnlightning.models._evaluation import EvaluatedModule, MeanLoss
from bnlightning.nn import batch_statistics


class RegressionSteps(EvaluatedModule):
    """The steps of a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.val_loss = MeanLoss()

    def forward(self, x: Tensor) -> Tensor:
        """The network's y for ``x``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of one batch."""
        x, y = batch
        loss = self.over_ranks(F.mse_loss(self(x), y), len(x))
        self.log("train/loss", loss, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The mean squared error of one evaluated batch, and the prediction for it."""
        x, y = batch
        with batch_statistics(self.net) if self.hparams.get("eval_statistics") == "batch" else nullcontext():
            prediction = self(x)
        loss = F.mse_loss(prediction, y)
        self.val_loss.update(loss, len(x))
        self.log_validation("loss", self.val_loss, len(x))
        return {"loss": loss, "prediction": prediction}
