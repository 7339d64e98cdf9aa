"""A LightningModule of one hidden unit that shows how a training step changes the moving averages of batch norm."""

import math
from collections import OrderedDict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.utilities.distributed import gather_all_tensors

from bnlightning._check import check_number
from bnlightning.compare.names import NOTE
from bnlightning.models.regression import RegressionSteps
from bnlightning.nn import BatchNorm1d, get_norm_layer
from bnlightning.nn.moments import world_size
from bnlightning.writing.writers import summary_writers

_MAX_POINTS = 8


class LitMovingAverage(RegressionSteps):
    """A network of one hidden unit that learns y from x by Adam.

    Its modules are ``net.linear1 norm1 act1 output output_norm``: a linear map, a normalisation, a ReLU, a linear map
    and a normalisation. The linear maps have no bias. The network is small enough to print every number in it.

    Every argument is a plain value, so that ``load_from_checkpoint`` rebuilds the same layers. Each rank normalises its
    part of a batch by itself. With ``norm="custom"`` and ``norm_options={"sync": True}`` the ranks normalise the whole
    batch together in training.

    Args:
        norm: Name of the normalisation: ``none``, ``custom`` (ours) or ``torch``.
        norm_options: Keyword arguments of the normalisation layers, such as ``{"eps": 1e-3, "momentum": 0.5}``.
        hidden_weight: Initial weight of the hidden unit.
        output_weight: Initial weight of the output.
        learning_rate: Learning rate of Adam.
        adam_eps: Epsilon of Adam. torch adds it after the bias correction, TensorFlow before. With the default, torch's
            first step equals TensorFlow's first step with TensorFlow's epsilon of 1e-8.

    Shape:
        Batches ``(x, y)``: both of shape ``(N, 1)``, in the network's dtype.

    Logs:
        ``train/loss`` and ``val/loss``: see :class:`~bnlightning.LitRegressor`. A test, which should be one batch, logs
        the numbers of the hidden layer:

        - ``test/hidden_weight``: its weight.
        - ``test/hidden_output_x<x>``, ``test/norm_output_x<x>``, ``test/act_output_x<x>``: the outputs of its linear
          map, normalisation and ReLU, for each of the first eight points by their x.
        - ``test/running_mean``, ``test/running_var``, ``test/scale``, ``test/shift``: the state of its normalisation.
        - ``test/note``, a text: the sum by which the last training step arrived at the running variance.

    Raises:
        ValueError: If an argument is out of range or a name is not known. In :meth:`check_data`, if the network
            has batch normalisation and a batch has one point.

    Example:
        >>> model = LitMovingAverage(norm="custom", norm_options={"convention": "keras", "momentum": 0.01})
        >>> model(torch.tensor([[0.0], [1.0]])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_options: dict[str, Any] | None = None,
        hidden_weight: float = 1.4059723615646362,
        output_weight: float = 0.128598,
        learning_rate: float = 1e-3,
        adam_eps: float = 1e-8 / math.sqrt(1 - 0.999),
    ) -> None:
        super().__init__()
        check_number("hidden_weight", hidden_weight)
        check_number("output_weight", output_weight)
        check_number("learning_rate", learning_rate, above=0.0)
        check_number("adam_eps", adam_eps, at_least=0.0)
        self.save_hyperparameters()
        norm_layer = get_norm_layer(norm, **norm_options or {})
        linear, output = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, hidden_weight)
        nn.init.constant_(output.weight, output_weight)
        self.net = nn.Sequential(
            OrderedDict(linear1=linear, norm1=norm_layer(1), act1=nn.ReLU(), output=output, output_norm=norm_layer(1))
        )
        # The running variance before the last training step, the weight of that step's batch in the next running
        # variance, and the output of the hidden layer's linear map in the step.
        self._update: tuple[Tensor, float, Tensor] | None = None

    @property
    def _hidden_weight(self) -> Tensor:
        return self.net.get_parameter("linear1.weight")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error of one batch."""
        norm = self.net.norm1
        if isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None:
            # As a function, because monitors would see a second call of the module.
            hidden = F.linear(batch[0], self._hidden_weight).detach()
            if (self.hparams["norm_options"] or {}).get("sync"):
                hidden = _of_all_ranks(hidden)
            self._update = norm.running_var.clone(), _weight_of_next_batch(norm), hidden
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log every number of the hidden layer."""
        x, _ = batch
        values: dict[str, Tensor | None] = {"hidden_weight": self._hidden_weight}
        output = x
        labels = {"linear1": "hidden", "norm1": "norm", "act1": "act"}
        for name, label in labels.items():
            output = self.net.get_submodule(name)(output)
            points, outputs = _of_all_ranks(x), _of_all_ranks(output)
            for point, value in zip(points[:_MAX_POINTS], outputs[:_MAX_POINTS], strict=True):
                values[f"{label}_output_x{point.item():g}"] = value
        norm = self.net.norm1
        if isinstance(norm, nn.BatchNorm1d):
            statistics = {"running_mean": norm.running_mean, "running_var": norm.running_var}
            values |= statistics | {"scale": norm.weight, "shift": norm.bias}
        logged = {f"test/{name}": value.squeeze() for name, value in values.items() if value is not None}
        # A batch size of 1, because any other would round the numbers once more. All ranks have the same numbers.
        self.log_dict(logged, batch_size=1, sync_dist=True)

    @rank_zero_only
    def on_test_end(self) -> None:
        """Write the note on the running variance."""
        note = self._note()
        for writer in summary_writers(self.loggers) if note else ():
            writer.add_text(NOTE, note, global_step=self.global_step)

    def _note(self) -> str:
        """Return the sum that gave the running variance, found from the numbers and not from the layer's convention."""
        norm = self.net.norm1
        if self._update is None or not isinstance(norm, nn.BatchNorm1d) or norm.running_var is None:
            return ""
        variance, momentum, hidden = self._update
        old, new = variance.item(), norm.running_var.item()
        n = len(hidden)
        biased, unbiased = (hidden.double().var(correction=correction).item() for correction in (0, 1))
        sums = {var: (1 - momentum) * old + momentum * var for var in (biased, unbiased)}
        var = min(sums, key=lambda var: abs(sums[var] - new))
        divisor = (
            f"biased variance (divided by n = {n})" if var == biased else f"unbiased variance (by n - 1 = {n - 1})"
        )
        note = (
            f"running variance {new:.7g} = {1 - momentum:.7g} * {old:.7g} before the step "
            f"+ {momentum:.7g} * {var:.7g}, the batch's {divisor}."
        )
        if var == unbiased:
            note += f" Training still normalises by the biased one, {biased:.7g}: only evaluation differs."
        options = self.hparams["norm_options"] or {}
        if self.hparams["norm"] == "torch" and options.get("convention", "pytorch") != "pytorch":
            note += f" torch's layer has one convention: {options['convention']!r} is ignored."
        return note

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"], eps=self.hparams["adam_eps"])


def _of_all_ranks(rows: Tensor) -> Tensor:
    return torch.cat(gather_all_tensors(rows)) if world_size() > 1 else rows


def _weight_of_next_batch(norm: nn.BatchNorm1d) -> float:
    """Return the weight of the next batch in the running statistics of our layer or torch's."""
    if isinstance(norm, BatchNorm1d):
        return float(norm.weight_of_next_batch())
    return norm.momentum if norm.momentum is not None else 1 / (norm.get_buffer("num_batches_tracked").item() + 1)
