"""What is known of batch norm layers over one optimizer step: moments of their input, and what they held before it.

Per channel the number of values, their sum and squares about a mean only add up, so that the moments are exact over
calls, micro-batches and ranks. They lie on the device, for all layers in one tensor, and are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlightning.callbacks._ranks import reduce_sums
from bnlightning.nn.functional import statistics_dtype

Array = NDArray[np.float64]

_NEAR_ZERO = 1e-3


@dataclass(frozen=True)
class BatchNormStatistics:
    """The statistics of one layer; ``None`` for what it does not have, or of what no finite value is left.

    Args:
        channels: Number of channels (of positions, where the statistics are per activation).
        scales: Number of entries of the scale, 0 without one.
        mean_drift: Largest distance of a running from a batch mean, in running standard deviations.
        var_drift: Largest absolute logarithm of the ratio of a running to a batch variance.
        rank_spread: Largest standard deviation of a batch mean over ranks, in standard deviations of the batch.
        scale_near_zero: Share of the scale's entries that are near zero.
        min_running_var: Smallest running variance.
        nonfinite: Share of the channels with a value in the input or a running statistic that is not finite.
    """

    channels: int
    scales: int
    mean_drift: float | None
    var_drift: float | None
    rank_spread: float | None
    scale_near_zero: float | None
    min_running_var: float | None
    nonfinite: float


class BatchNormRows:
    """Accumulators for the input of ``layers``, and a copy of their running statistics.

    Args:
        layers: Batch norm layers. One that is lazy and has no parameters yet is left out until :meth:`start` finds it
            with parameters.
        device: Where the accumulators live, whatever devices the layers are on.
    """

    def __init__(self, layers: Sequence[_BatchNorm], device: torch.device) -> None:
        self._layers = list(layers)
        self._device = device
        self._sizes: list[int] = []
        self._allocate()

    def _allocate(self) -> None:
        # Apple's GPUs have no float64.
        real = torch.float32 if self._device.type == "mps" else torch.float64
        self._sizes = [_channels(layer) for layer in self._layers]
        # By channel: number of values, sum, squared sum over number by call, squares about the mean of each call.
        self._moments = torch.zeros(4, sum(self._sizes), dtype=real, device=self._device)
        self._parts = [part.unbind(0) for part in self._moments.split(self._sizes, dim=1)]

    @torch.no_grad()
    def start(self) -> None:
        """A step begins: forget the one before, and remember what the layers hold."""
        if self._sizes != [_channels(layer) for layer in self._layers]:
            self._allocate()
        self._moments.zero_()
        self._running = self._copied([_running(layer) for layer in self._layers], dim=1)
        self._counted = self._copied([_count(layer) for layer in self._layers], dim=0)
        scales = [_scale(layer) for layer in self._layers]
        entries = torch.tensor([scale.numel() for scale in scales], device=self._device).to(self._moments)
        # Rows: how many entries of the scale are near zero, and how many there are; of this rank's shard, if sharded.
        self._scales = torch.stack((self._copied([_near_zero(scale) for scale in scales], dim=0), entries))
        self._tracked = [_is_tracked(layer) for layer in self._layers]
        self._updates = [_updates(layer) for layer in self._layers]

    def _copied(self, tensors: list[Tensor], dim: int) -> Tensor:
        return torch.cat([tensor.to(self._moments) for tensor in tensors], dim=dim)

    @torch.no_grad()
    def update(self, index: int, input: Tensor) -> None:
        """Add the input of a call of layer ``index``, of shape ``(N, C)`` or ``(N, C, ...)``, any floating dtype.

        Two passes over the values, in float32 at least, and as much memory as they take, until the call is over.
        """
        values = _by_channel(self._layers[index], input)
        size = self._sizes[index]
        # What the layer refuses, it should say itself.
        if values is None or values.shape[1] != size:
            return
        n = values.numel() // size
        # About the mean of the first sample: it is cheap, and keeps the digits of values far from zero. It cannot be
        # further from the mean of all N samples than sqrt(N) of their standard deviations.
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
        """Add up the moments of all ranks, on all ranks, in one collective; every rank must call it, once a step.

        A layer that did not run on a rank has no part in it. What the layers held stays this rank's own, but for the
        scales, which may be sharded.
        """
        n, sums, squared_sums, squares = self._moments
        has = n > 0
        mean = sums / n.clamp(min=1)
        squares = squares + (squared_sums - sums * mean).clamp(min=0)
        good = mean.isfinite() & squares.isfinite()
        rows = torch.stack((n, sums, n * mean.square(), squares, has.to(n), mean, mean.square()))
        rows = torch.cat((rows.where(good, 0.0), (~good).to(n)[None]))
        self._reduced, self._scales = reduce_sums([rows, self._scales])

    def statistics(self) -> list[BatchNormStatistics | None]:
        """The statistics of each layer, ``None`` for one without parameters so far; waits for the device once."""
        parts = (self._reduced, self._running, self._counted, self._scales)
        read = torch.cat([part.flatten() for part in parts]).cpu().double().numpy()
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        reduced, running, counted, scales = (
            values.reshape(part.shape) for values, part in zip(np.split(read, ends), parts, strict=True)
        )
        starts = np.cumsum(self._sizes)[:-1]
        by_layer = zip(
            self._layers,
            np.split(reduced, starts, axis=1),
            np.split(running, starts, axis=1),
            scales.T,
            [
                tracked and (count > 0 or not updates)
                for tracked, count, updates in zip(self._tracked, counted, self._updates, strict=True)
            ],
            self._tracked,
            strict=True,
        )
        return [_statistics(*each) if each[1].size else None for each in by_layer]


def _channels(layer: _BatchNorm) -> int:
    return 0 if any(map(is_lazy, (*layer.parameters(), *layer.buffers()))) else layer.num_features


def _is_tracked(layer: _BatchNorm) -> bool:
    return _channels(layer) > 0 and layer.running_mean is not None and layer.running_var is not None


def _running(layer: _BatchNorm) -> Tensor:
    """Mean and variance, shape ``(2, C)``; zeros where there are none."""
    if not _is_tracked(layer):
        return torch.zeros(2, _channels(layer))
    assert layer.running_mean is not None and layer.running_var is not None
    return torch.stack((layer.running_mean, layer.running_var))


def _count(layer: _BatchNorm) -> Tensor:
    count = layer.num_batches_tracked
    return torch.ones(1) if count is None else count.view(1)


def _updates(layer: _BatchNorm) -> bool:
    return layer.training and layer.track_running_stats and not getattr(layer, "frozen", False)


def _scale(layer: _BatchNorm) -> Tensor:
    """What this rank has of the scale; empty without one."""
    weight: Any = layer.weight if _channels(layer) else None
    if weight is None:
        return torch.zeros(0)
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _near_zero(scale: Tensor) -> Tensor:
    return (scale.abs() < _NEAR_ZERO).sum().view(1)


def _by_channel(layer: _BatchNorm, input: Tensor) -> Tensor | None:
    """``input`` as ``(N, C, values)``, or ``None`` where that cannot be."""
    if input.dim() < 2 or input.numel() == 0 or not input.is_floating_point():
        return None
    x = input.detach().to(statistics_dtype(input))
    if getattr(getattr(layer, "convention", None), "per_activation", False):
        return x.flatten(1).unsqueeze(2)
    return x.reshape(*x.shape[:2], -1)


def _statistics(
    layer: _BatchNorm, reduced: Array, running: Array, scales: Array, comparable: bool, tracked: bool
) -> BatchNormStatistics:
    """From what is known of a layer to its statistics.

    Args:
        layer: For its ``eps`` and its estimator of the variance.
        reduced: What :meth:`BatchNormRows.reduce` makes, shape ``(8, C)``.
        running: Mean and variance before the step, shape ``(2, C)``.
        scales: How many entries of the scale are near zero, and how many there are.
        comparable: Whether the running statistics are more than initial values that the step replaces.
        tracked: Whether there are running statistics.
    """
    n, sums, squared_sums, squares, ranks, rank_means, squared_rank_means, bad = reduced
    running_mean, running_var = running
    near_zero, entries = scales
    with np.errstate(all="ignore"):
        mean = sums / n
        var = (squares + np.maximum(squared_sums - sums * mean, 0)) / n
        mean[bad > 0] = np.nan
        spread = np.sqrt(np.maximum(squared_rank_means / ranks - (rank_means / ranks) ** 2, 0) / (var + layer.eps))
        # Like with like: the estimator that the running variance averages.
        unbiased = getattr(getattr(layer, "convention", None), "unbiased", True)
        estimate = np.where(n > 1, var * (n / (n - 1) if unbiased else 1), np.nan)
        mean_drift = np.abs(running_mean - mean) / np.sqrt(running_var + layer.eps)
        var_drift = np.abs(np.log((running_var + layer.eps) / (estimate + layer.eps)))
        spread[bad > 0], var_drift[bad > 0] = np.nan, np.nan
    broken = (bad > 0) | ~np.isfinite(running).all(axis=0)
    return BatchNormStatistics(
        channels=len(n),
        scales=int(entries),
        mean_drift=_largest(mean_drift) if comparable else None,
        var_drift=_largest(var_drift) if comparable else None,
        rank_spread=_largest(spread[ranks > 1]),
        scale_near_zero=near_zero / entries if entries else None,
        min_running_var=_negative(_largest(-running_var)) if tracked else None,
        nonfinite=float(broken.mean()),
    )


def _largest(values: Array) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
