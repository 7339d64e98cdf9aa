"""Accumulators of batch norm layers over one optimizer step: moments of their input, and what they held before it.

Each channel has the number of values, their sum and squares about a mean. These only add up, so the moments are exact
over calls, micro-batches and ranks. They lie on the device, in one tensor for all layers, and are read once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnlightning.monitors.counting.precision import real_dtype
from bnlightning.monitors.counting.ranks import is_first_rank, reduce_sums
from bnlightning.nn.functional import statistics_dtype

Array = NDArray[np.float64]

_NEAR_ZERO = 1e-3


@dataclass(frozen=True)
class NormCounts:
    """The statistics of one layer. ``None`` stands for what the layer does not have, or has no finite value of.

    Args:
        channels: Number of channels. Number of positions, if the statistics are per activation.
        scales: Number of entries of the scale. 0 without one.
        seen: Whether the layer had any input on any rank.
        mean_drift: Distance of the running from the batch mean, in running standard deviations. The largest channel's.
        var_drift: Absolute logarithm of the running over the batch variance. The largest channel's.
        rank_spread: Standard deviation over ranks of their batch means, in standard deviations of the whole batch. The
            largest channel's.
        scale_near_zero: Share of the scale's entries below 1e-3 in magnitude.
        min_running_var: Smallest running variance.
        nonfinite: Share of the channels with a NaN or an infinity in the input or the running statistics.
    """

    channels: int
    scales: int
    seen: bool
    mean_drift: float | None
    var_drift: float | None
    rank_spread: float | None
    scale_near_zero: float | None
    min_running_var: float | None
    nonfinite: float


class NormAccumulators:
    """Accumulators for the input of ``layers``, and a copy of their running statistics.

    Args:
        layers: Batch norm layers. A lazy layer is left out until :meth:`start` finds it with parameters.
        device: Device of the accumulators, whatever devices the layers are on.
    """

    def __init__(self, layers: Sequence[_BatchNorm], device: torch.device) -> None:
        self._layers = list(layers)
        self._device = device
        self._real = real_dtype(device)
        self._allocate([_channels(layer) for layer in self._layers])

    def _allocate(self, sizes: list[int]) -> None:
        self._sizes = sizes
        # By channel: number of values, sum, squared sum of each call over its number, squares about each call's mean.
        self._moments = torch.zeros(4, sum(sizes), dtype=self._real, device=self._device)
        self._parts = [part.unbind(0) for part in torch.split(self._moments, sizes, dim=1)]

    @torch.no_grad()
    def start(self) -> None:
        """Begin a step: forget the one before, and remember what the layers hold."""
        sizes = [_channels(layer) for layer in self._layers]
        if sizes != self._sizes:
            self._allocate(sizes)
        self._moments.zero_()
        sized = list(zip(self._layers, sizes, strict=True))
        self._updates = np.array([_updates(layer) for layer in self._layers])
        self._tracked = np.array([size > 0 and layer.running_mean is not None for layer, size in sized])
        held = [
            (layer.running_mean, layer.running_var) if tracked else (torch.zeros(size), torch.zeros(size))
            for (layer, size), tracked in zip(sized, self._tracked, strict=True)
        ]
        self._running = torch.stack([self._packed(tensors) for tensors in zip(*held, strict=True)])
        counts = [layer.num_batches_tracked for layer in self._layers]
        self._counted = self._packed([torch.ones(1) if count is None else count.view(1) for count in counts])
        self._scales = self._near_zero([_scale(layer) if size else torch.zeros(0) for layer, size in sized])

    def _packed(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.to(self._device) for tensor in tensors]).to(self._real)

    def _near_zero(self, scales: list[Tensor]) -> Tensor:
        """For each scale the number of entries near zero and the number of all, shape ``(2, layers)``."""
        entries = [scale.numel() for scale in scales]
        near = self._packed(scales).abs() < _NEAR_ZERO
        counts = torch.stack([part.sum() for part in torch.split(near, entries)])
        return torch.stack((counts, torch.tensor(entries, device=self._device))).to(self._real)

    @torch.no_grad()
    def update(self, index: int, input: Tensor) -> None:
        """Add the input of one call of a layer.

        It takes two passes over the values, in float32 at least. It holds a copy of the values until the call is over.

        Args:
            index: Number of the layer.
            input: Shape ``(N, C)`` or ``(N, C, ...)``, any floating dtype.
        """
        values = _by_channel(self._layers[index], input)
        size = self._sizes[index]
        # An input that the layer refuses is passed over: the layer itself should say so.
        if values is None or values.shape[1] != size:
            return
        n = values.numel() // size
        # Sums are about the mean of the first sample. It is cheap, and keeps the digits of values far from zero. It is
        # at most sqrt(N) standard deviations away from the mean of all N samples.
        origin = values[:1].mean(dim=2, keepdim=True)
        centred = values - origin
        total = centred.sum(dim=(0, 2))
        squares = centred.square_().sum(dim=(0, 2))
        offset, total, squares = torch.stack((origin.view(size), total, squares)).to(self._moments).unbind(0)
        mean = torch.add(offset, total, alpha=1 / n)
        counts, sums, squared_sums, squares_about_mean = self._parts[index]
        counts.add_(n)
        sums.add_(mean, alpha=n)
        squared_sums.addcmul_(mean, mean, value=n)
        squares_about_mean.add_(squares).addcmul_(total, total, value=-1 / n)

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up the moments of all ranks, on all ranks, in one collective. Every rank must call it, once a step.

        A rank on which a layer did not run adds nothing for it. Non-finite sums stay non-finite. Running statistics
        become those of the first rank. The counts of scales are added up, since scales may be sharded.
        """
        n, sums, squared_sums, squares = self._moments
        has = n > 0
        mean = sums / n.clamp(min=1)
        squares = squares + (squared_sums - sums * mean).clamp(min=0)
        rows = torch.stack((n, sums, n * mean.square(), squares, has.to(n), mean, mean.square()))
        held = (self._running, self._counted)
        of_first = [tensor if is_first_rank() else torch.zeros_like(tensor) for tensor in held]
        self._reduced, self._scales, self._running, self._counted = reduce_sums([rows, self._scales, *of_first])

    def statistics(self) -> list[NormCounts | None]:
        """The statistics of each layer. ``None`` for a lazy layer without parameters. It waits for the device once."""
        parts = (self._reduced, self._running, self._counted, self._scales)
        read = torch.cat([part.flatten() for part in parts]).cpu().double().numpy()
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        reduced, running, counted, scales = (
            values.reshape(part.shape) for values, part in zip(np.split(read, ends), parts, strict=True)
        )
        sizes = np.array(self._sizes)
        eps = np.repeat([layer.eps for layer in self._layers], sizes)
        unbiased = np.repeat([_is_unbiased(layer) for layer in self._layers], sizes)
        rows = _by_layer(_channel_statistics(reduced, running, eps, unbiased), sizes)
        # Initial values that the step itself replaces are not worth comparing with.
        comparable = self._tracked & ((counted > 0) | ~self._updates)
        return [
            _layer_statistics(*each) if each[0] else None
            for each in zip(self._sizes, rows.T, *scales, self._tracked, comparable, strict=True)
        ]


def _channels(layer: _BatchNorm) -> int:
    """The number of channels. 0 for a lazy layer without parameters."""
    return 0 if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params() else layer.num_features


def _updates(layer: _BatchNorm) -> bool:
    return layer.training and layer.track_running_stats and not getattr(layer, "frozen", False)


def _is_unbiased(layer: _BatchNorm) -> bool:
    return getattr(getattr(layer, "convention", None), "unbiased", True)


def _scale(layer: _BatchNorm) -> Tensor:
    """The part of the scale that this rank holds. Empty without a scale."""
    weight: Any = layer.weight
    if weight is None:
        return torch.zeros(0)
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight.flatten()
    return part


def _by_channel(layer: _BatchNorm, input: Tensor) -> Tensor | None:
    """``input`` in the shape ``(N, C, values)``. ``None`` if that is not possible."""
    if input.dim() < 2 or input.numel() == 0 or not input.is_floating_point():
        return None
    x = input.detach().to(statistics_dtype(input))
    if getattr(getattr(layer, "convention", None), "per_activation", False):
        return x.flatten(1).unsqueeze(2)
    return x.reshape(*x.shape[:2], -1)


def _channel_statistics(reduced: Array, running: Array, eps: Array, unbiased: NDArray[np.bool_]) -> Array:
    """The statistics of each channel. NaN where there are none.

    Args:
        reduced: What :meth:`NormAccumulators.reduce` makes, shape ``(7, C)``.
        running: Running mean and variance before the step, shape ``(2, C)``.
        eps: The layer's ``eps``, shape ``(C,)``.
        unbiased: Whether the running variance averages unbiased variances, shape ``(C,)``.

    Returns:
        Shape ``(6, C)``. The rows are: drift of the mean, drift of the variance, spread over ranks, minus the running
        variance, number of values, whether a value is not finite. The last row holds 1 or 0.
    """
    n, sums, squared_sums, squares, ranks, rank_means, squared_rank_means = reduced
    running_mean, running_var = running
    with np.errstate(all="ignore"):
        mean = sums / n
        var = (squares + np.maximum(squared_sums - sums * mean, 0)) / n
        # It is infinite where a value is, or where a square is too large for float32.
        var[np.isinf(var)] = np.nan
        mean[np.isnan(var)] = np.nan
        # Compare like with like: the estimator that the running variance averages.
        estimate = np.where(n > 1, var * np.where(unbiased, n / (n - 1), 1), np.nan)
        between_ranks = np.maximum(squared_rank_means / ranks - (rank_means / ranks) ** 2, 0)
        values = np.stack(
            (
                np.abs(running_mean - mean) / np.sqrt(running_var + eps),
                np.abs(np.log((running_var + eps) / (estimate + eps))),
                np.where(ranks > 1, np.sqrt(between_ranks / (var + eps)), np.nan),
                -running_var,
                n,
                ((n > 0) & np.isnan(var)) | ~np.isfinite(running).all(axis=0),
            )
        )
    values[np.isinf(values)] = np.nan
    return values


def _by_layer(values: Array, sizes: NDArray[np.int64]) -> Array:
    """The largest value over the channels of each layer, shape ``(6, layers)``. The last row is their mean instead."""
    by_layer = np.full((len(values), len(sizes)), np.nan)
    # For a layer without channels, reduceat would take the first channel of the next one.
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    if len(starts):
        by_layer[:, sizes > 0] = np.fmax.reduceat(values, starts, axis=1)
        by_layer[-1, sizes > 0] = np.add.reduceat(values[-1], starts) / sizes[sizes > 0]
    return by_layer


def _layer_statistics(
    channels: int, values: Array, near_zero: float, entries: float, tracked: bool, comparable: bool
) -> NormCounts:
    mean_drift, var_drift, rank_spread, minus_running_var, n, nonfinite = (_finite(value) for value in values)
    return NormCounts(
        channels=channels,
        scales=int(entries),
        seen=bool(n),
        mean_drift=mean_drift if comparable else None,
        var_drift=var_drift if comparable else None,
        rank_spread=rank_spread,
        scale_near_zero=float(near_zero / entries) if entries else None,
        min_running_var=-minus_running_var if tracked and minus_running_var is not None else None,
        nonfinite=nonfinite or 0.0,
    )


def _finite(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
