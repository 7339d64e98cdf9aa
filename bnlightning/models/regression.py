"""Regression of one number by another, with a deep network."""

from typing import Any

import torch

from bnlightning._check import check_choice, check_integer, check_number
from bnlightning.models._regression import RegressionSteps
from bnlightning.nn import MLP, get_act_layer, get_norm_layer, init_normal_


class LitRegressor(RegressionSteps):
    """An :class:`~bnlightning.MLP` that learns y from x by plain SGD on the mean squared error.

    Every argument is a plain value, so that ``load_from_checkpoint`` rebuilds the same layers.

    Args:
        norm: The normalisation: ``none``, ``custom`` (ours) or ``torch``.
        norm_options: Keyword arguments of the normalisation layer, e.g. ``{"eps": 1e-3, "momentum": 0.5}``.
        activation: A key of :data:`bnlightning.nn.ACTIVATIONS`.
        depth: Number of hidden layers.
        width: Features of every hidden layer.
        weight_std: Standard deviation of the normal distribution the weights are drawn from. The default of 1 is a
            deliberately bad one: with 30 inputs a sum has a standard deviation of more than 5.
        bias: Initial bias of every linear layer.
        normalize_input: Whether to normalise the input, too.
        eval_statistics: What batch normalisation uses in evaluation: its ``running`` statistics, as torch does, or
            those of the evaluated ``batch`` (the running ones are still kept in training).
        learning_rate: Of the gradient descent.

    Shape:
        Batches ``(x, y)`` of ``(N, 1)`` each, the network's dtype.

    Batch normalisation takes the statistics of each rank's own part of a batch, or in training, with
    ``norm_options={"sync": True}`` and ``norm="custom"``, of the whole.

    Logs:
        ``train/loss``: mean squared error of the batch, over the points of all ranks, before the step it leads to.
        ``val/loss``: mean squared error over all points evaluated, on all ranks. Its x-axis is the number of optimizer
        steps taken before the evaluation.

    Raises:
        ValueError: If an argument is out of range or a name is not known; the message says which and what would do.
            In :meth:`check_data`, for batches of one point with batch normalisation.
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
        """Plain stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])
