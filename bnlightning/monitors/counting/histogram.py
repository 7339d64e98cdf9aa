"""Histograms that only ever add up: over calls, steps and ranks.

The sign, the exponent and the first three bits of the mantissa of a float32 are the number of a logarithmic bin: eight
bins an octave, zero and the smallest denormals in a bin of their own, infinities and NaN beyond the last finite one.
"""

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHIFT = 20
NUM_BINS = 1 << (32 - _SHIFT)
_HALF = NUM_BINS // 2
_FINITE = 0x7F800000 >> _SHIFT
# How far below the largest magnitude two values still fall into different bins of a published histogram, as a factor.
# TensorBoard draws 30 bins over the range of all steps; what is finer would take most of the file.
_RESOLUTION = 2.0**-5


def count_values(x: Tensor) -> Tensor:
    """How many values fall into each bin.

    Args:
        x: float32 of any shape, also non-finite values.

    Returns:
        int64 of shape ``(NUM_BINS,)``: negative values first, ascending in magnitude, then the others likewise.
    """
    # The shift is arithmetic, so that negative values have negative numbers.
    number = (x.contiguous().view(torch.int32).view(-1) >> _SHIFT).add_(_HALF)
    if x.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        # There bincount waits for the device. Of integers this counts as exactly; told to be deterministic, older
        # versions of torch refuse it nevertheless.
        return torch.histc(number, bins=NUM_BINS, min=0, max=NUM_BINS - 1).to(torch.int64)
    return torch.bincount(number, minlength=NUM_BINS)


def num_zero(bins: NDArray[np.int64]) -> int:
    """How many are zero, or below 2^-129 in magnitude, which is next to the smallest float32."""
    return int(bins[0] + bins[_HALF])


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending edges (one more than counts), and the moments TensorBoard keeps beside them."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    sum: float
    sum_squares: float


def finite_histogram(
    bins: NDArray[np.int64], minimum: float, maximum: float, total: float, total_squares: float
) -> Histogram:
    """The finite bins in ascending order of their values, those too near to zero to be told apart put together.

    Args:
        bins: What :func:`count_values` gave, added up; at least one finite value.
        minimum: Smallest finite value.
        maximum: Largest finite value.
        total: Their sum.
        total_squares: The sum of their squares.
    """
    extent = max(abs(minimum), abs(maximum))
    # The bins from the resolution up to the extent; those below the first are put together.
    first, stop = np.searchsorted(MAGNITUDES, [extent * _RESOLUTION, extent], side="right").tolist()
    first, stop = max(first - 1, 1), min(stop, _FINITE)
    magnitudes = MAGNITUDES[first : stop + 1]
    negative, positive = bins[:stop], bins[_HALF : _HALF + stop]
    edges = np.concatenate([-magnitudes[::-1], [0.0], magnitudes])
    counts = np.concatenate(
        [negative[first:][::-1], [negative[:first].sum(), positive[:first].sum()], positive[first:]]
    )
    return Histogram(*_fit(edges, counts, minimum, maximum), total, total_squares)


def _magnitudes() -> NDArray[np.float64]:
    edges = (np.arange(_FINITE + 1, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    # The end of the last finite bin is the largest float32 and not infinity.
    edges[-1] = np.finfo(np.float32).max
    return edges


# The edges of the finite bins of one sign: one more than bins, each with its lower edge.
MAGNITUDES = _magnitudes()


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


def clip(histogram: Histogram, low: float, high: float) -> Histogram:
    """The same with every value outside ``[low, high]`` counted in the outermost bin inside."""
    edges = np.clip(histogram.edges, low, high)
    # Bins outside have no width any more.
    kept = np.flatnonzero(np.diff(edges) > 0)
    if not len(kept) or np.array_equal(edges, histogram.edges):
        return histogram
    first, last = kept[0], kept[-1]
    counts = histogram.counts[first : last + 1].copy()
    counts[0] += histogram.counts[:first].sum()
    counts[-1] += histogram.counts[last + 1 :].sum()
    return Histogram(edges[first : last + 2], counts, histogram.sum, histogram.sum_squares)


class TypicalRanges:
    """Keeps outliers from widening the axis: TensorBoard spreads 30 bins over the range of all steps of a tag.

    What lies further outside of the inner 99.8 % of a step's values than these are wide, or further from zero than ten
    times what is typical of the tag (the median of its last 64 steps), is counted in the outermost bin that is left.
    """

    def __init__(self) -> None:
        self._extents: dict[str, list[float]] = {}

    def fit(self, tag: str, histogram: Histogram) -> Histogram:
        """The histogram as it is to be drawn; remembers its range under its tag."""
        cumulative = np.cumsum(histogram.counts)
        total = cumulative[-1]
        inner = np.flatnonzero((cumulative > _TAIL * total) & (cumulative - histogram.counts < (1 - _TAIL) * total))
        low, high = float(histogram.edges[inner[0]]), float(histogram.edges[inner[-1] + 1])
        extents = self._extents.setdefault(tag, [])
        extents.append(max(abs(low), abs(high)))
        del extents[:-_NUM_REMEMBERED]
        limit = _FAR * median(extents)
        width = high - low
        low, high = max(low - width, -limit), min(high + width, limit)
        if limit == 0 or (low <= histogram.edges[0] and histogram.edges[-1] <= high):
            return histogram
        return clip(histogram, low, high)

    def state_dict(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return {tag: list(extents) for tag, extents in self._extents.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._extents = {tag: list(extents) for tag, extents in state.items()}


_TAIL = 1e-3
_FAR = 10.0
_NUM_REMEMBERED = 64
