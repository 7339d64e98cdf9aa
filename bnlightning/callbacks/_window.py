"""What is known of the activations of several modules over a window of forward passes.

Counts only add up, so a window is exact over micro-batches, steps and ranks. It lives on the device and is read once,
when it is published.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The sign, the exponent and the first three bits of the mantissa of a float32 are the number of a logarithmic bin:
# eight bins an octave, zero and its denormals in bins of their own, infinities and NaN beyond the last finite one.
_SHIFT = 20
_NUM_BINS = 1 << (32 - _SHIFT)
_HALF = _NUM_BINS // 2
_FINITE = 0x7F800000 >> _SHIFT
# How far below the largest magnitude two values still fall into different bins, as a factor. Finer ones could not be
# told apart in any picture, and would take most of the file.
_RESOLUTION = 2.0**-8

_NUMEL, _FINITE_COUNT, _ZERO, _LOW, _HIGH = range(5)


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending edges (one more than counts), and the moments TensorBoard keeps beside them."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    sum: float
    sum_squares: float


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one module's output over a window: fractions in [0, 1], moments over the finite values.

    Args:
        units: Number of units (channels or features); of all calls, where they differ in it.
        dead: Share of the units whose output was exactly zero for every sample. A unit with a non-finite value is
            not dead.
        zero: Share of zeros among the finite values.
        saturated: Share of the finite values beyond the activation's limits; ``None`` for an unbounded activation.
        nonfinite: Share of NaN and infinities among all values.
        mean: ``None`` without a finite value.
        std: Population standard deviation; ``None`` without a finite value.
        histogram: ``None`` without a finite value.
    """

    units: int
    dead: float
    zero: float | None
    saturated: float | None
    nonfinite: float
    mean: float | None
    std: float | None
    histogram: Histogram | None


class ActivationWindow:
    """Accumulators for the outputs of ``len(limits)`` modules.

    Args:
        limits: For each module the values beyond which it counts as saturated, or ``None``.
        device: Where the accumulators live.
    """

    def __init__(self, limits: Sequence[tuple[float, float] | None], device: torch.device) -> None:
        self.limits = limits
        # Apple's GPUs have no float64.
        real = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.zeros(len(limits), 5, dtype=torch.int64, device=device)
        self.bins = torch.zeros(len(limits), _NUM_BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(limits), 2, dtype=real, device=device)
        # The minimum with its sign turned, so that both are maxima.
        self.extrema = torch.full((len(limits), 2), -torch.inf, dtype=real, device=device)
        # By the number of units, which differs between the calls of a module that is used twice.
        self.fired: dict[tuple[int, int], Tensor] = {}

    def update(self, index: int, output: Tensor) -> None:
        """Add an output of module ``index``: floating, ``(N, ...)``; the units are in :func:`unit_dim`."""
        x = output.detach().float()
        if x.numel() == 0:
            return
        finite = x.isfinite()
        real = torch.where(finite, x, 0.0)
        exact = real.to(self.sums.dtype)
        num_finite = finite.sum()
        nothing = num_finite.new_zeros(())
        limits = self.limits[index]
        low = (real < limits[0]).sum() if limits else nothing
        high = (real > limits[1]).sum() if limits else nothing
        zero = num_finite - torch.count_nonzero(real)
        self.counts[index] += torch.stack([nothing + x.numel(), num_finite, zero, low, high])
        self.sums[index] += torch.stack([exact.sum(), exact.square().sum()])
        extrema = torch.stack([-torch.where(finite, x, torch.inf).amin(), torch.where(finite, x, -torch.inf).amax()])
        self.extrema[index] = torch.maximum(self.extrema[index], extrema.to(self.extrema.dtype))
        number = (x.contiguous().view(torch.int32) >> _SHIFT) & (_NUM_BINS - 1)
        self.bins[index] += torch.bincount(number.flatten(), minlength=_NUM_BINS)
        fired = (x != 0).transpose(0, unit_dim(x)).flatten(1).any(dim=1) if x.dim() > 1 else (x != 0).any()[None]
        before = self.fired.get((index, len(fired)))
        self.fired[index, len(fired)] = fired if before is None else before | fired

    def reduce(self) -> None:
        """Add up the windows of all ranks, on all ranks: five collectives, however many modules.

        Every rank must call it. A module that did not run on some rank has no part in its counts.
        """
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        gathered: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(self.fired))
        keys = sorted({key for each in gathered for key in each})
        packed = torch.cat(
            [
                self.fired[key].to(torch.uint8)
                if key in self.fired
                else torch.zeros(key[1], dtype=torch.uint8, device=self.counts.device)
                for key in keys
            ]
            or [torch.zeros(0, dtype=torch.uint8, device=self.counts.device)]
        )
        integers = torch.cat([self.counts, self.bins], dim=1)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        dist.all_reduce(integers)
        dist.all_reduce(self.sums)
        dist.all_reduce(self.extrema, op=dist.ReduceOp.MAX)
        self.counts, self.bins = integers[:, :5], integers[:, 5:]
        parts = packed.split([units for _, units in keys]) if keys else ()
        self.fired = {key: part.bool() for key, part in zip(keys, parts, strict=True)}

    def statistics(self) -> list[LayerStatistics | None]:
        """The statistics of each module, ``None`` for one that gave no output in the window."""
        counts, bins = self.counts.cpu().numpy(), self.bins.cpu().numpy()
        sums, extrema = self.sums.cpu().numpy(), self.extrema.cpu().numpy()
        fired: dict[int, list[Tensor]] = {}
        for (index, _), units in self.fired.items():
            fired.setdefault(index, []).append(units)
        return [
            _statistics(counts[i], bins[i], sums[i], extrema[i], torch.cat(fired[i]), limits) if i in fired else None
            for i, limits in enumerate(self.limits)
        ]


def unit_dim(x: Tensor) -> int:
    """The dimension of the units: 1 (the channels) of an image or a volume, otherwise the last."""
    return 1 if x.dim() > 3 else x.dim() - 1


def _statistics(
    counts: NDArray[np.int64],
    bins: NDArray[np.int64],
    sums: NDArray[np.float64],
    extrema: NDArray[np.float64],
    fired: Tensor,
    limits: tuple[float, float] | None,
) -> LayerStatistics:
    numel, finite = int(counts[_NUMEL]), int(counts[_FINITE_COUNT])
    units = len(fired)
    dead = 1.0 - int(fired.sum()) / units
    nonfinite = 1.0 - finite / numel
    if finite == 0:
        return LayerStatistics(units, dead, None, None, nonfinite, None, None, None)
    mean = float(sums[0]) / finite
    return LayerStatistics(
        units=units,
        dead=dead,
        zero=int(counts[_ZERO]) / finite,
        saturated=int(counts[_LOW] + counts[_HIGH]) / finite if limits is not None else None,
        nonfinite=nonfinite,
        mean=mean,
        std=float(np.sqrt(max(float(sums[1]) / finite - mean**2, 0.0))),
        histogram=_histogram(bins, -float(extrema[0]), float(extrema[1]), float(sums[0]), float(sums[1])),
    )


def _histogram(
    bins: NDArray[np.int64], minimum: float, maximum: float, total: float, total_squares: float
) -> Histogram:
    """The finite bins in ascending order of their values, those too near to zero to be told apart put together."""
    positive, negative = bins[:_FINITE], bins[_HALF : _HALF + _FINITE]
    magnitudes = (np.arange(_FINITE + 1, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    # The end of the last finite bin is the largest float32 and not infinity.
    magnitudes[-1] = np.finfo(np.float32).max
    resolution = max(abs(minimum), abs(maximum)) * _RESOLUTION
    first = max(int(np.searchsorted(magnitudes, resolution)), 1)
    edges = np.concatenate([-magnitudes[first:][::-1], [0.0], magnitudes[first:]])
    counts = np.concatenate(
        [negative[first:][::-1], [negative[:first].sum()], [positive[:first].sum()], positive[first:]]
    )
    return Histogram(*_fit(edges, counts, minimum, maximum), total, total_squares)


def _fit(
    edges: NDArray[np.float64], counts: NDArray[np.int64], minimum: float, maximum: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cut empty bins off both ends and end in the minimum and the maximum.

    A bin that begins at the maximum holds nothing but that value (a saturated 1.0, say) and would have no width: its
    count goes to the bin before it. Likewise at the minimum.
    """
    used = np.flatnonzero(counts)
    edges, counts = edges[used[0] : used[-1] + 2].copy(), counts[used[0] : used[-1] + 1].copy()
    if len(counts) > 1 and edges[-2] >= maximum:
        counts[-2] += counts[-1]
        edges, counts = edges[:-1], counts[:-1]
    if len(counts) > 1 and edges[1] <= minimum:
        counts[1] += counts[0]
        edges, counts = edges[1:], counts[1:]
    edges[0], edges[-1] = minimum, maximum
    if minimum == maximum:
        # One value only: TensorBoard wants a bin with a width.
        width = max(abs(minimum) * 1e-3, 1e-6)
        edges = np.array([minimum - width, minimum + width])
        counts = counts.sum(keepdims=True)
    return edges, counts
