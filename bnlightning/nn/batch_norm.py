"""Batch normalisation layers: torch's, with the running statistics of other frameworks' conventions, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from bnlightning._check import check_choice, check_number
from bnlightning.nn.functional import batch_norm_fast, batch_norm_reference


@dataclass(frozen=True)
class Convention:
    """How a framework keeps its running statistics.

    Args:
        momentum: Weight of the new batch in a running statistic, torch's direction: what TensorFlow and Keras call
            momentum or decay is ``1 - momentum``. ``None``: the framework has no default, the layer must be given one.
        eps: Added to the variance. ``None``: no default either.
        unbiased: Whether the running variance averages ``n / (n - 1)`` times the batch's (biased) variance.
            Every framework normalises the batch itself with the biased variance.
        initial_mean: What the running mean starts from.
        initial_var: What the running variance starts from.
    """

    momentum: float | None
    eps: float | None
    unbiased: bool
    initial_mean: float = 0.0
    initial_var: float = 1.0


CONVENTIONS: dict[str, Convention] = {
    "pytorch": Convention(momentum=0.1, eps=1e-5, unbiased=True),
    "keras": Convention(momentum=0.01, eps=1e-3, unbiased=False),
    "tf_fused": Convention(momentum=0.01, eps=1e-3, unbiased=True),
    "tf_ema": Convention(momentum=None, eps=None, unbiased=False, initial_var=0.0),
    "flax": Convention(momentum=0.01, eps=1e-5, unbiased=False),
}
"""The named conventions: torch; Keras 3 and TensorFlow's layer on 2-D input; TensorFlow's fused kernel on 4-D input;
``tf.nn.moments`` with ``tf.train.ExponentialMovingAverage``, whose averages start from zero; Flax NNX."""

_BACKENDS = {"fast": batch_norm_fast, "reference": batch_norm_reference}


class _ConventionBatchNorm(_TorchBatchNorm):
    """What the layers of one, two and three dimensions share."""

    def __init__(
        self,
        num_features: int,
        eps: float | None = None,
        momentum: float | Literal["convention"] | None = "convention",
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        convention: str | Convention = "pytorch",
        backend: str = "fast",
    ) -> None:
        check_choice("backend", backend, _BACKENDS)
        if not isinstance(convention, Convention):
            check_choice("convention", convention, CONVENTIONS)
        named = CONVENTIONS[convention] if isinstance(convention, str) else convention
        self.convention = named
        self.backend = backend
        super().__init__(
            num_features,
            _given("eps", eps, named.eps, convention),
            momentum if momentum is None else _given("momentum", momentum, named.momentum, convention),
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            # torch before 2.15 does not know the argument; there only the default can be asked for.
            **({} if bias else {"bias": False}),
        )

    def reset_running_stats(self) -> None:
        """Start the running statistics again from the convention's initial values."""
        super().reset_running_stats()
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.fill_(self.convention.initial_mean)
            self.running_var.fill_(self.convention.initial_var)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, by the batch's statistics in training and by the running statistics in evaluation.

        As in torch, a layer without running statistics normalises by the batch's in evaluation too.
        """
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {input.shape[1]} channels: num_features={self.num_features}."
            )
        if not self.training and self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if input.numel() == 0:
            # There is nothing to normalise and nothing to learn the statistics from.
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        output, mean, var = _BACKENDS[self.backend](input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._update_running_stats(mean, var, n=input.numel() // input.shape[1])
        return output

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor, n: int) -> None:
        """One step of the running averages, from the batch's mean and biased variance over ``n`` values a channel."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.convention.unbiased:
            var = var * (n / (n - 1))
        dtype = self.running_mean.dtype
        # A tensor and not its .item(): no wait for the device, and torch.compile keeps one graph.
        weight = self.momentum if self.momentum is not None else (1.0 / self.num_batches_tracked).to(dtype)
        self.running_mean.lerp_(mean.to(dtype), weight)
        self.running_var.lerp_(var.to(dtype), weight)

    def extra_repr(self) -> str:
        """The arguments, as in torch, and the convention."""
        return f"{super().extra_repr()}, convention={_name(self.convention)}, backend={self.backend!r}"


class BatchNorm1d(_ConventionBatchNorm, nn.BatchNorm1d):
    """Batch normalisation of ``(N, C)`` or ``(N, C, L)`` input, in torch's convention or another framework's.

    A :class:`torch.nn.BatchNorm1d` with the same state_dict keys and, by default, the same numbers; see there for
    ``num_features``, ``affine``, ``track_running_stats`` and ``bias``. In training the statistics are those of the
    batch on this process.

    Args:
        num_features: C.
        eps: Added to the variance; by default the convention's.
        momentum: Weight of the new batch in the running statistics (torch's direction, 1 - TensorFlow's decay);
            ``None`` averages over all batches seen; by default the convention's.
        affine: Whether to learn a scale (``weight``) and a shift (``bias``).
        track_running_stats: Whether to keep running statistics; without them the batch's are used in evaluation too.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: Whether to learn the shift (``False`` needs torch 2.15).
        convention: A name among ``pytorch keras tf_fused tf_ema flax``, or a :class:`Convention`.
        backend: ``fast`` uses torch's kernels, ``reference`` the formulas and the hand-derived backward pass of
            :mod:`bnlightning.nn.functional`.

    Raises:
        ValueError: For an unknown convention or backend, a missing momentum or eps where the convention has none,
            and in training for a channel with fewer than two values.

    Example:
        >>> layer = BatchNorm1d(30, momentum=0.5, eps=1e-3, convention="keras")
        >>> layer(torch.randn(10, 30)).shape
        torch.Size([10, 30])
    """


class BatchNorm2d(_ConventionBatchNorm, nn.BatchNorm2d):
    """As :class:`BatchNorm1d`, of ``(N, C, H, W)`` input."""


class BatchNorm3d(_ConventionBatchNorm, nn.BatchNorm3d):
    """As :class:`BatchNorm1d`, of ``(N, C, D, H, W)`` input."""


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Inside the context every batch norm layer of ``module`` normalises by the batch's statistics.

    For an evaluation in the manner of the first tutorials on batch normalisation, which have no train/test switch:
    ``with batch_statistics(net.eval()): net(x)``. The running statistics are neither read nor changed, and they are
    back afterwards, also after an exception. Works on torch's layers and on ours.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _TorchBatchNorm)]
    kept = [(layer.running_mean, layer.running_var, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.running_mean = layer.running_var = None
            layer.track_running_stats = False
        yield
    finally:
        for layer, (mean, var, track) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var, layer.track_running_stats = mean, var, track


def _given(name: str, value: Any, default: float | None, convention: str | Convention) -> float:
    value = default if value is None or value == "convention" else value
    if value is None:
        raise ValueError(
            f"{name}={value!r} is not possible: the convention {convention!r} has no default for it. Pass {name}=..."
        )
    check_number(name, value, at_least=0.0)
    if name == "momentum" and value > 1:
        raise ValueError(f"momentum={value!r} is not possible: give the weight of the new batch, from 0 to 1.")
    return value


def _name(convention: Convention) -> str:
    return next((repr(name) for name, known in CONVENTIONS.items() if known == convention), repr(convention))
