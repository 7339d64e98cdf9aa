"""A LightningModule that predicts one number from another with a deep network, and the steps of any regression."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlightning._check import check_choice, check_integer, check_number
from bnlightning.models._evaluation import EvaluatedModule, MeanLoss
from bnlightning.nn import MLP, batch_statistics, get_act_layer, get_norm_layer, init_normal_


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


class LitRegressor(RegressionSteps):
    """An :class:`~bnlightning.MLP` that learns y from x by plain SGD on the mean squared error.

    Every argument is a plain value, so that ``load_from_checkpoint`` rebuilds the same layers. Each rank normalises its
    part of a batch by itself. With ``norm="custom"`` and ``norm_options={"sync": True}`` the ranks normalise the whole
    batch together in training.

    Args:
        norm: Name of the normalisation: ``none``, ``custom`` (ours) or ``torch``.
        norm_options: Keyword arguments of the normalisation layers, such as ``{"eps": 1e-3, "momentum": 0.5}``.
        activation: Name of the activation, a key of :data:`bnlightning.nn.ACTIVATIONS`.
        depth: Number of hidden layers.
        width: Number of features of every hidden layer.
        weight_std: Standard deviation of the normally distributed initial weights. The default of 1 is bad on purpose:
            a sum over 30 inputs has a standard deviation of more than 5.
        bias: Initial bias of every linear layer.
        normalize_input: Whether to normalise the input too.
        eval_statistics: Statistics that batch normalisation uses in evaluation: the ``running`` ones, as torch does, or
            those of the evaluated ``batch``. Training keeps running statistics in both cases.
        learning_rate: Learning rate of the gradient descent.

    Shape:
        Batches ``(x, y)``: both of shape ``(N, 1)``, in the network's dtype.

    Logs:
        ``train/loss``: mean squared error of the batch over the points of all ranks, before the optimizer step.
        ``val/loss``: mean squared error over all evaluated points on all ranks. It is logged at the number of optimizer
        steps taken before the evaluation.

    Raises:
        ValueError: If an argument is out of range or a name is not known. In :meth:`check_data`, if the network
            has batch normalisation and a batch has one point.

    Example:
        >>> model = LitRegressor(norm="custom", activation="tanh", depth=3)
        >>> model(torch.randn(8, 1)).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_options: dict[str, Any] | None = None,
        activation: str = "tanh",
        depth: int = 7,
        width: int = 30,
        weight_std: float = 1.0,
        bias: float = 0.1,
        normalize_input: bool = True,
        eval_statistics: str = "running",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        check_integer("depth", depth, at_least=1)
        check_integer("width", width, at_least=1)
        check_number("weight_std", weight_std, at_least=0.0)
        check_number("bias", bias)
        check_number("learning_rate", learning_rate, above=0.0)
        check_choice("eval_statistics", eval_statistics, ("running", "batch"))
        self.save_hyperparameters()
        self.net = MLP(
            [1, *[width] * depth, 1],
            norm_layer=get_norm_layer(norm, **norm_options or {}),
            act_layer=get_act_layer(activation),
            normalize_input=normalize_input,
        )
        init_normal_(self.net, weight_std, bias)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])
