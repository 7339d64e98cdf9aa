"""Histograms that only ever add up: over calls, steps and ranks.

Bins are logarithmic, eight an octave. The number of a value's bin is made of the sign, the exponent and the first three
bits of the mantissa of its float32. Zero and the smallest denormals have a bin of their own. Infinities and NaN are
beyond the last finite bin. Values of float64 have eight times as many bins, made likewise of their own bits.
"""

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHIFT = 20
NUM_BINS = 1 << (32 - _SHIFT)
_FINITE = 0x7F800000 >> _SHIFT
_WIDE_SHIFT = 49
NUM_WIDE_BINS = 1 << (64 - _WIDE_SHIFT)
_WIDE_FINITE = 0x7FF0000000000000 >> _WIDE_SHIFT
# Magnitudes below this share of the largest one are put together in a published histogram. TensorBoard draws 30 bins
# over the range of all steps, and finer bins would take most of the file.
_RESOLUTION = 2.0**-5


def count_values(x: Tensor) -> Tensor:
    """Count the values that fall into each bin.

    Args:
        x: float32 or float64 of any shape. It may hold non-finite values.

    Returns:
        int64 of shape ``(NUM_BINS,)``, or ``(NUM_WIDE_BINS,)`` for float64: negative values by ascending magnitude,
        then the others likewise.
    """
    is_wide = x.dtype is torch.float64
    bits, shift, bins = (torch.int64, _WIDE_SHIFT, NUM_WIDE_BINS) if is_wide else (torch.int32, _SHIFT, NUM_BINS)
    # The shift is arithmetic, so negative values have negative numbers.
    number = (x.contiguous().view(bits).view(-1) >> shift).add_(bins // 2)
    if x.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        # On CUDA bincount waits for the device. histc counts integers just as exactly. Older versions of torch refuse
        # it all the same when they are told to be deterministic.
        return torch.histc(number, bins=bins, min=0, max=bins - 1).to(torch.int64)
    return torch.bincount(number, minlength=bins)


def num_zero(bins: NDArray[np.int64]) -> int:
    """The number of values that are zero or denormal, below 2^-129 in magnitude or below 2^-1025 of float64."""
    return int(bins[0] + bins[len(bins) // 2])


def narrowed(bins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bins of float64 as those of float32. Values beyond the range of float32 are in its outermost bins.

    Args:
        bins: Sums of what :func:`count_values` returned.

    Returns:
        int64 of shape ``(NUM_BINS,)``. The bins themselves, if they are those of float32.
    """
    if len(bins) == NUM_BINS:
        return bins
    return np.bincount(np.tile(_NARROW, 2) + np.repeat([0, NUM_BINS // 2], len(_NARROW)), bins, NUM_BINS).astype(
        np.int64
    )


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending edges, and the moments that TensorBoard keeps beside them.

    Args:
        edges: float64 of shape ``(bins + 1,)``, ascending.
        counts: int64 of shape ``(bins,)``.
        sum: Sum of the values.
        sum_squares: Sum of the squares of the values.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    sum: float
    sum_squares: float


def finite_histogram(
    bins: NDArray[np.int64], minimum: float, maximum: float, total: float, total_squares: float
) -> Histogram:
    """The finite bins in ascending order of their values. Bins too near to zero to be told apart are put together.

    Args:
        bins: Sums of what :func:`count_values` returned, with a finite value or more.
        minimum: Smallest finite value.
        maximum: Largest finite value.
        total: Sum of the finite values.
        total_squares: Sum of the squares of the finite values.
    """
    extent, half = max(abs(minimum), abs(maximum)), len(bins) // 2
    all_magnitudes = MAGNITUDES if len(bins) == NUM_BINS else _WIDE_MAGNITUDES
    # The bins from the resolution up to the extent. The bins below the first of them are put together.
    first, stop = np.searchsorted(all_magnitudes, [extent * _RESOLUTION, extent], side="right").tolist()
    first, stop = max(first - 1, 1), min(stop, len(all_magnitudes) - 1)
    magnitudes = all_magnitudes[first : stop + 1]
    negative, positive = bins[:stop], bins[half : half + stop]
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


def _wide_magnitudes() -> NDArray[np.float64]:
    edges = (np.arange(_WIDE_FINITE + 1, dtype=np.uint64) << np.uint64(_WIDE_SHIFT)).view(np.float64).copy()
    edges[-1] = np.finfo(np.float64).max
    return edges


# The edges of the finite bins of one sign: the lower edge of each, and the upper edge of the last.
MAGNITUDES = _magnitudes()
_WIDE_MAGNITUDES = _wide_magnitudes()


def _narrow_numbers() -> NDArray[np.int64]:
    """The number of the narrow bin, of one sign, for each wide bin: the same octave and eighth, as far as there are."""
    numbers = np.searchsorted(MAGNITUDES, _WIDE_MAGNITUDES[:-1], side="right") - 1
    # Zero has a bin of its own, which no other value may get into.
    numbers = np.clip(numbers, 1, _FINITE - 1)
    numbers[0] = 0
    beyond = NUM_WIDE_BINS // 2 - _WIDE_FINITE
    return np.concatenate([numbers, np.full(beyond, _FINITE)])


_NARROW = _narrow_numbers()


def _fit(
    edges: NDArray[np.float64], counts: NDArray[np.int64], minimum: float, maximum: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cut empty bins off both ends, and move the outermost edges to the minimum and the maximum.

    A bin that begins at the maximum holds nothing but that value, such as a saturated 1.0. It would have no width, so
    its count goes to the bin before it. The minimum is treated likewise.
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
    """The histogram with every value outside of ``[low, high]`` counted in the outermost bin inside."""
    edges = np.clip(histogram.edges, low, high)
    # Bins outside have no width after clipping.
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

    The inner range of a step holds the inner 99.8 % of its values. Two kinds of values are outliers, and are counted in
    the outermost bin that is left:

    - values further outside of the inner range than it is wide, and
    - values further from zero than ten times what is typical of the tag.

    Typical is the median over the tag's last 64 steps of how far from zero the inner range reaches.

    Example:
        >>> ranges = TypicalRanges()
        >>> histogram = Histogram(np.array([0.0, 1.0, 2.0, 1e6]), np.array([5000, 5000, 1]), 1e6, 1e12)
        >>> ranges.fit("layer_hist/net", histogram).edges.tolist()
        [0.0, 1.0, 2.0, 4.0]
    """

    def __init__(self) -> None:
        self._extents: dict[str, list[float]] = {}

    def fit(self, tag: str, histogram: Histogram) -> Histogram:
        """Return the histogram without outliers, and remember its range under its tag."""
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
        """The remembered ranges by tag, for a checkpoint."""
        return {tag: list(extents) for tag, extents in self._extents.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._extents = {tag: list(extents) for tag, extents in state.items()}


_TAIL = 1e-3
_FAR = 10.0
_NUM_REMEMBERED = 64
