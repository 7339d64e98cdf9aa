"""LightningModules that classify images with a multilayer perceptron or a convolutional network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from bnlightning._check import check_choice, check_integer, check_number
from bnlightning.models._evaluation import EvaluatedModule, MeanLoss
from bnlightning.nn import MLP, ConvNet, get_act_layer, get_norm_layer, init_normal_, init_variance_scaling_

PLACEMENTS = ("none", "conv", "linear", "both", "conv_after", "linear_after", "both_after")
"""The layers that a :class:`LitConvClassifier` normalises: none, convolutions, hidden linear layers, or both. With
``_after`` the normalisation comes after the activation, otherwise before it."""


class ClassificationSteps(EvaluatedModule):
    """Training, validation and test of a classification by ``net``.

    The constructor of a subclass builds ``net`` and then calls :meth:`init_weights`.

    Args:
        num_classes: Number of classes, at least 2.

    Logs:
        ``train/loss``: mean cross entropy of the batch over the samples of all ranks, before the optimizer step.
        ``val/loss``, ``test/loss``: mean cross entropy over all evaluated samples on all ranks.
        ``val/acc``, ``test/acc``: share of the evaluated samples on all ranks whose largest output is that of their
        class, from 0 to 1. Evaluations are logged at the number of optimizer steps taken before them.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, at_least=2)
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def init_weights(self, init_scale: float, weight_std: float | None) -> None:
        """Draw the weights and set the biases to 0.

        Args:
            init_scale: Variance of the weights times their number of inputs. Used if ``weight_std`` is ``None``.
            weight_std: Standard deviation of normally distributed weights.
        """
        check_number("init_scale", init_scale, above=0.0)
        if weight_std is None:
            init_variance_scaling_(self.net, init_scale)
        else:
            check_number("weight_std", weight_std, at_least=0.0)
            init_normal_(self.net, weight_std, bias=0.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of one batch."""
        x, y = batch
        loss = self.over_ranks(F.cross_entropy(self(x), y), len(x))
        self.log("train/loss", loss, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one evaluated batch to ``val/loss`` and ``val/acc``."""
        x, y = batch
        self._evaluate(x, y, self.val_loss, self.val_acc)
        self.log_validation("loss", self.val_loss, len(x))
        self.log_validation("acc", self.val_acc, len(x))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch of the test to ``test/loss`` and ``test/acc``."""
        x, y = batch
        self._evaluate(x, y, self.test_loss, self.test_acc)
        self.log("test/loss", self.test_loss, batch_size=len(x))
        self.log("test/acc", self.test_acc, batch_size=len(x))

    def _evaluate(self, x: Tensor, y: Tensor, loss: MeanLoss, accuracy: MulticlassAccuracy) -> None:
        logits = self(x)
        loss.update(F.cross_entropy(logits, y), len(x))
        # The metric does not take a batch without samples.
        if len(x):
            accuracy.update(logits, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])


class LitClassifier(ClassificationSteps):
    """An :class:`~bnlightning.MLP` that learns the class of an image by plain SGD on the cross entropy.

    Every argument is a plain value, so that ``load_from_checkpoint`` rebuilds the same layers. Each rank normalises its
    part of a batch by itself. With ``norm="custom"`` and ``norm_options={"sync": True}`` the ranks normalise the whole
    batch together in training.

    Args:
        norm: Name of the normalisation: ``none``, ``custom`` (ours) or ``torch``.
        norm_options: Keyword arguments of the normalisation layers, such as ``{"eps": 1e-3, "momentum": 0.1}``.
        activation: Name of the activation, a key of :data:`bnlightning.nn.ACTIVATIONS`.
        width: Number of features of each hidden layer: one number for all layers, or one number for each.
        depth: Number of hidden layers if ``width`` is one number; by default 1.
        normalize_output: Whether to normalise the outputs (logits) too.
        init_scale: Variance of the initial weights times their number of inputs. 1 is LeCun's, 2 is He's.
        weight_std: Standard deviation of normally distributed initial weights. If given, it replaces ``init_scale``.
        learning_rate: Learning rate of the gradient descent.
        in_features: Number of values of an image.
        num_classes: Number of classes.

    Shape:
        Batches ``(x, y)``: images of shape ``(N, ...)`` with ``in_features`` values each, in the network's dtype;
        classes of shape ``(N,)``, int64.

    Logs:
        ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``: see :class:`ClassificationSteps`.

    Raises:
        ValueError: If an argument is out of range or a name is not known. In :meth:`check_data`, if the network
            has batch normalisation and a batch has one sample.

    Example:
        >>> model = LitClassifier(norm="custom", activation="relu", width=100, depth=2)
        >>> model(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_options: dict[str, Any] | None = None,
        activation: str = "elu",
        width: int | Sequence[int] = (300, 100),
        depth: int | None = None,
        normalize_output: bool = True,
        init_scale: float = 1.0,
        weight_std: float | None = None,
        learning_rate: float = 0.01,
        in_features: int = 784,
        num_classes: int = 10,
    ) -> None:
        super().__init__(num_classes)
        check_number("learning_rate", learning_rate, above=0.0)
        self.save_hyperparameters()
        self.net = MLP(
            [in_features, *_widths(width, depth), num_classes],
            norm_layer=get_norm_layer(norm, **norm_options or {}),
            act_layer=get_act_layer(activation),
            normalize_output=normalize_output,
        )
        self.init_weights(init_scale, weight_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images."""
        logits: Tensor = self.net(x.flatten(1))
        return logits


class LitConvClassifier(ClassificationSteps):
    """A :class:`~bnlightning.ConvNet` that learns the class of an image by plain SGD on the cross entropy.

    Every argument is a plain value, so that ``load_from_checkpoint`` rebuilds the same layers. Each rank normalises its
    part of a batch by itself, unless ``norm_options`` has ``sync`` (see :class:`LitClassifier`).

    Args:
        norm: Name of the normalisation: ``none``, ``custom`` (ours) or ``torch``.
        norm_options: Keyword arguments of the normalisation layers, such as ``{"eps": 1e-3, "momentum": 0.1}``.
        norm_placement: Layers to normalise, before or after their activation: one of :data:`PLACEMENTS`.
        activation: Name of the activation, a key of :data:`bnlightning.nn.ACTIVATIONS`.
        channels: Number of output channels of each convolution.
        features: Number of features of each hidden linear layer.
        init_scale: Variance of the initial weights times their number of inputs. 1 is LeCun's, 2 is He's.
        weight_std: Standard deviation of normally distributed initial weights. If given, it replaces ``init_scale``.
        learning_rate: Learning rate of the gradient descent.
        in_shape: Channels, height and width of an image.
        num_classes: Number of classes.

    Shape:
        Batches ``(x, y)``: images of shape ``(N, *in_shape)`` in the network's dtype; classes of shape ``(N,)``, int64.

    Logs:
        ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``: see :class:`ClassificationSteps`.

    Raises:
        ValueError: If an argument is out of range or a name is not known. In :meth:`check_data`, if the network
            has batch normalisation and a batch has one sample.

    Example:
        >>> model = LitConvClassifier(norm="custom", norm_placement="conv")
        >>> model(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_options: dict[str, Any] | None = None,
        norm_placement: str = "both",
        activation: str = "relu",
        channels: Sequence[int] = (8, 16),
        features: Sequence[int] = (64,),
        init_scale: float = 2.0,
        weight_std: float | None = None,
        learning_rate: float = 0.01,
        in_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__(num_classes)
        check_number("learning_rate", learning_rate, above=0.0)
        check_choice("norm_placement", norm_placement, PLACEMENTS)
        self.save_hyperparameters()
        options = norm_options or {}
        layers, _, after = norm_placement.partition("_")
        self.net = ConvNet(
            in_shape,
            channels,
            features,
            num_classes,
            conv_norm_layer=get_norm_layer(norm if layers in ("both", "conv") else "none", 2, **options),
            linear_norm_layer=get_norm_layer(norm if layers in ("both", "linear") else "none", **options),
            act_layer=get_act_layer(activation),
            norm_after_act=bool(after),
        )
        self.init_weights(init_scale, weight_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, *in_shape)``."""
        logits: Tensor = self.net(x)
        return logits


def _widths(width: int | Sequence[int], depth: int | None) -> list[int]:
    """Return the number of features of each hidden layer."""
    if not isinstance(width, Sequence):
        check_integer("width", width, at_least=1)
        check_integer("depth", 1 if depth is None else depth, at_least=1)
        return [width] * (1 if depth is None else depth)
    for number in width:
        check_integer("width", number, at_least=1)
    if depth is not None and depth != len(width):
        raise ValueError(
            f"depth={depth!r} is not possible with width={list(width)!r}, which has {len(width)} hidden layers: give "
            "one number as width, or leave depth out."
        )
    return list(width)
