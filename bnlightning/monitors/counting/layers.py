"""What is known of the values of several layers over a window of forward passes.

Every accumulator only adds up (or is a maximum), so a window is exact over calls, micro-batches, steps and ranks. It
lives on the device and is read once, when it is published. A layer takes 33 kB, and 32 bytes for each of its units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnlightning.monitors.counting.histogram import NUM_BINS, count_values
from bnlightning.monitors.counting.precision import real_dtype
from bnlightning.monitors.counting.ranks import all_keys, reduce_maxima, reduce_sums

MAX_UNITS_OF_RANK = 1024
"""Layers with more units have no effective rank: their matrix of second moments would be too large."""

Limits = tuple[float, float]
Number = float | Tensor

# Magnitudes from this to its inverse have squares that float32 adds up without loss.
_SAFE = 1e-10
_LARGEST_SHIFT = 2.0**100

_NONZERO, _MAGNITUDE, _LOW, _HIGH = range(4)


@dataclass(frozen=True)
class LayerKey:
    """What tells one layer's row from another, the same on every rank.

    Args:
        family: First part of the tags, ``"layer"`` or ``"layer_grad"``.
        label: Path of the module, with the number of the call and the place in the output, as it stands in tags.
        is_activation: Whether it counts under ``health/``.
        units: How many; 0 where units are not looked at.
        limits: The values beyond which it counts as saturated; ``None`` for an unbounded activation.
    """

    family: str
    label: str
    is_activation: bool = False
    units: int = 0
    limits: Limits | None = None


@dataclass(frozen=True)
class UnitSums:
    """Sums over the samples and positions of a window, for each unit: float64 of shape ``(units,)``.

    Args:
        observations: Samples times positions (the other dimensions); one number for all units.
        samples: Sizes of the batches.
        nonzero: Number of values that are not zero; non-finite ones are not.
        magnitude: Sum of the absolute finite values.
        low: Number of finite values below the activation's limits; zeros for an unbounded activation.
        high: Number of finite values above them.
    """

    observations: int
    samples: int
    nonzero: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def __add__(self, other: "UnitSums") -> "UnitSums":
        return UnitSums(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class LayerSums:
    """All that is known of a layer's values over a window and all ranks.

    Args:
        bins: Counts by :func:`bnlightning.monitors.counting.histogram.count_values`.
        numel: How many values there are.
        finite: How many of them are finite.
        sum: Of the finite values.
        sum_squares: Of the finite values.
        minimum: Of the finite values; infinity without one.
        maximum: Of the finite values; minus infinity without one.
        units: ``None`` where they are not looked at.
        second_moments: ``X^T X`` of the finite values as a matrix of observations by units, where it was asked for.
    """

    bins: NDArray[np.int64]
    numel: int
    finite: int
    sum: float
    sum_squares: float
    minimum: float
    maximum: float
    units: UnitSums | None
    second_moments: NDArray[np.float64] | None


class LayerAccumulators:
    """Accumulators for any number of layers, which come into being as they are seen.

    Args:
        effective_rank: Whether second moments of the units are kept, ``units * units`` numbers a layer.
    """

    def __init__(self, effective_rank: bool = False) -> None:
        self.effective_rank = effective_rank
        self._rows: dict[LayerKey, _Row] = {}

    def __len__(self) -> int:
        return sum(row.seen for row in self._rows.values())

    def reset(self) -> None:
        """Forget everything but which layers there are."""
        for row in self._rows.values():
            row.reset()

    def update(self, key: LayerKey, values: Tensor, unit_dim: int = -1) -> None:
        """Add some values of a layer: floating, of any shape; with units in ``unit_dim`` if the key has them."""
        row = self._rows.get(key)
        if row is None:
            # Evaluations run in inference mode, whose tensors nobody may change later.
            with torch.inference_mode(False):
                row = self._rows[key] = _Row(key, values.device, self.effective_rank)
        if values.numel():
            row.update(_Values(values, unit_dim))

    def reduce(self, device: torch.device) -> dict[LayerKey, LayerSums]:
        """The sums over all ranks, on all ranks, of the layers that ran on any: four collectives, however many layers.

        Every rank must call it.

        Args:
            device: Of the collectives.
        """
        keys = all_keys([key for key, row in self._rows.items() if row.seen], device)
        if not keys:
            return {}
        with torch.no_grad(), torch.inference_mode(False):
            rows = [self._rows.get(key) or _Row(key, device, self.effective_rank) for key in keys]
            bins = torch.stack([row.bins for row in rows])
            counts = _table([[row.finite, row.samples, row.numel] for row in rows], torch.int64, device)
            moments = _moments(rows, real_dtype(device), device)
            # The minimum with its sign turned, so that both are maxima.
            extrema = _table([[-row.minimum, row.maximum] for row in rows], real_dtype(device), device)
            units = torch.cat([row.units.flatten() for row in rows])
            seconds = torch.cat([row.second_moments.flatten() for row in rows])
            bins, counts, moments, units, seconds = reduce_sums([bins, counts, moments, units, seconds])
            (extrema,) = reduce_maxima([extrema])
        return _split(keys, rows, *(each.cpu().numpy() for each in (bins, counts, moments, extrema, units, seconds)))


class _Row:
    """Accumulators of one layer: numbers are floats on a CPU, elsewhere tensors that nobody waits for."""

    def __init__(self, key: LayerKey, device: torch.device, effective_rank: bool) -> None:
        self.key = key
        self.seen = False
        real = real_dtype(device)
        self.bins = torch.zeros(NUM_BINS, dtype=torch.int64, device=device)
        sums = 0 if not key.units else 4 if key.limits else 2
        self.units = torch.zeros(sums, key.units, dtype=real, device=device)
        self._unit_sums = self.units.unbind()
        rank = key.units if effective_rank and key.units <= MAX_UNITS_OF_RANK else 0
        self.second_moments = torch.zeros(rank, rank, dtype=real, device=device)
        # Sums are of the values less this: their squares about zero would lose the digits of a small variance.
        self.shift: Number | None = None
        self.samples = self.numel = 0
        self.finite: Number = 0
        self.total: Number = 0.0
        self.squares: Number = 0.0
        self.minimum: Number = math.inf
        self.maximum: Number = -math.inf

    def reset(self) -> None:
        if self.seen:
            self.seen = False
            self.bins.zero_()
            self.units.zero_()
            if len(self.second_moments):
                self.second_moments.zero_()
            self.samples = self.numel = self.finite = 0
            self.total = self.squares = 0.0
            self.minimum, self.maximum = math.inf, -math.inf

    def update(self, values: "_Values") -> None:
        self.seen = True
        self.samples += values.samples
        self.numel += values.x.numel()
        self.finite = self.finite + values.num_finite
        self.bins += count_values(values.x)
        self.minimum = _smaller(self.minimum, values.minimum)
        self.maximum = _larger(self.maximum, values.maximum)
        self._update_moments(values)
        if self.key.units:
            self._update_units(values)

    def _update_moments(self, values: "_Values") -> None:
        if self.shift is None:
            self.shift = _middle(values)
        shift, scale = self.shift, values.scale()
        shifted = values.fill(shift) - shift if scale is None else values.fill(shift) * scale - shift * scale
        flat = shifted.view(-1)
        total, squares = values.read(flat.sum()), values.read(torch.dot(flat, flat))
        self.total = self.total + (total if scale is None else total / scale)
        self.squares = self.squares + (squares if scale is None else squares / scale / scale)

    def _update_units(self, values: "_Values") -> None:
        # Signs and sums of floats are several times as fast on a CPU as comparisons and sums of booleans.
        magnitude = values.fill(0.0).abs()
        self._unit_sums[_MAGNITUDE].add_(values.sum_by_unit(magnitude))
        nonzero = magnitude.sign_()
        if values.finite is not None:
            nonzero = torch.where(values.finite, nonzero, 1.0)
        self._unit_sums[_NONZERO].add_(values.sum_by_unit(nonzero))
        if self.key.limits is not None:
            low, high = self.key.limits
            between = values.fill((max(low, -1e30) + min(high, 1e30)) / 2)
            self._unit_sums[_LOW].add_(values.sum_by_unit((low - between).sign_().clamp_min_(0.0)))
            self._unit_sums[_HIGH].add_(values.sum_by_unit((between - high).sign_().clamp_min_(0.0)))
        if len(self.second_moments):
            matrix = values.by_unit(values.fill(0.0)).to(self.second_moments.dtype)
            with torch.autocast(matrix.device.type, enabled=False):
                self.second_moments += matrix.T @ matrix


class _Values:
    """Values of one call, ready to be counted.

    Attributes:
        x: Contiguous float32 of at least one value and two dimensions.
        unit_dim: The dimension of the units.
        samples: Size of the batch.
        finite: Which values are finite; ``None`` if all are known to be.
        num_finite: How many are.
        minimum: Of the finite ones.
        maximum: Of the finite ones.
    """

    def __init__(self, values: Tensor, unit_dim: int) -> None:
        x = values.detach().float()
        if x.dim() < 2:
            # One unit, and as many samples as values.
            x, unit_dim = x.reshape(-1, 1), 1
        self.samples = len(x)
        self.unit_dim = unit_dim % x.dim()
        if not x.is_contiguous():
            x = self._made_contiguous(x)
        self.x = x
        self._others = [dim for dim in range(x.dim()) if dim != self.unit_dim]
        self.finite: Tensor | None = None
        self.num_finite: Number = x.numel()
        self.minimum: Number
        self.maximum: Number
        if x.device.type == "cpu":
            # A CPU may be asked; a GPU would have to be waited for.
            low, high = torch.aminmax(x)
            self.minimum, self.maximum = low.item(), high.item()
            if math.isfinite(self.minimum) and math.isfinite(self.maximum):
                return
        self.finite = x.isfinite()
        self.num_finite = self.read(self.finite.sum())
        self.minimum = self.read(torch.where(self.finite, x, math.inf).amin())
        self.maximum = self.read(torch.where(self.finite, x, -math.inf).amax())

    def read(self, number: Tensor) -> Number:
        """A result as a float where that needs no waiting."""
        return number.item() if self.x.device.type == "cpu" else number.to(real_dtype(self.x.device))

    def fill(self, value: Number) -> Tensor:
        """The values, with ``value`` in the place of each that is not finite."""
        return self.x if self.finite is None else torch.where(self.finite, self.x, value)

    def scale(self) -> Number | None:
        """A power of two that brings the values near to 1, so that squares neither overflow nor vanish in float32.

        ``None`` where a CPU tells that there is no need.
        """
        extent = _larger(self.maximum, -self.minimum)
        if isinstance(extent, float):
            if _SAFE < extent < 1 / _SAFE or not 0 < extent < math.inf:
                return None
            return math.ldexp(1.0, -max(math.frexp(extent)[1], -120))
        exponent = torch.frexp(extent.nan_to_num(posinf=1.0, neginf=1.0).clamp_min(2.0**-120))[1]
        return torch.ldexp(torch.ones_like(extent), -exponent)

    def by_unit(self, values: Tensor) -> Tensor:
        """As a matrix of observations by units."""
        return values.movedim(self.unit_dim, -1).flatten(0, -2)

    def sum_by_unit(self, values: Tensor) -> Tensor:
        # float32 holds every count up to 2^24.
        if values.numel() > 2**24 * values.shape[self.unit_dim]:
            return values.sum(self._others, dtype=real_dtype(values.device))
        return values.sum(self._others)

    def _made_contiguous(self, x: Tensor) -> Tensor:
        if x.dim() > 3 and x.movedim(1, -1).is_contiguous():
            # channels_last: the same memory, in its own order.
            self.unit_dim = x.dim() - 1 if self.unit_dim == 1 else self.unit_dim - (self.unit_dim > 1)
            return x.movedim(1, -1)
        return x.contiguous()


def _middle(values: _Values) -> Number:
    """Near the mean of the finite values, and a float32; 0 if there are none."""
    # The sum may overflow, and a value less the shift.
    mean = (values.fill(0.0).sum() / values.num_finite).nan_to_num(nan=0.0)
    return values.read(mean.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT))


def _smaller(one: Number, other: Number) -> Number:
    return torch.clamp(other, max=one) if isinstance(other, Tensor) else min(one, other)


def _larger(one: Number, other: Number) -> Number:
    return torch.clamp(other, min=one) if isinstance(other, Tensor) else max(one, other)


def _table(numbers: Sequence[Sequence[Number]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of shape ``(rows, columns)``, in a few operations for each column, however many rows."""
    return torch.stack([_column(column, dtype, device) for column in zip(*numbers, strict=True)], dim=1)


def _column(numbers: Sequence[Number], dtype: torch.dtype, device: torch.device) -> Tensor:
    like = next((number for number in numbers if isinstance(number, Tensor)), None)
    if like is None:
        # Not one by one: for each of them a GPU would be waited for.
        return torch.tensor(numbers, dtype=dtype, device=device)
    tensors = [number if isinstance(number, Tensor) else like.new_tensor(number) for number in numbers]
    return torch.stack(tensors).to(device, dtype)


def _moments(rows: Sequence[_Row], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sum of the finite values of each row, and of their squares, shape ``(rows, 2)``."""
    numbers = [[row.finite, 0.0 if row.shift is None else row.shift, row.total, row.squares] for row in rows]
    finite, shift, total, squares = _table(numbers, dtype, device).unbind(1)
    # From about the shift, which each rank has chosen for itself, to about zero; in float64 nothing is lost.
    return torch.stack([total + finite * shift, squares + 2 * shift * total + finite * shift**2], dim=1)


def _split(
    keys: list[LayerKey],
    rows: list[_Row],
    bins: NDArray[np.int64],
    counts: NDArray[np.int64],
    moments: NDArray[np.float64],
    extrema: NDArray[np.float64],
    units: NDArray[np.float64],
    seconds: NDArray[np.float64],
) -> dict[LayerKey, LayerSums]:
    take_units, take_seconds = _taker(units), _taker(seconds)
    finite, samples, numel = counts.T.tolist()
    (total, squares), (low, high) = moments.T.tolist(), extrema.T.tolist()
    layers = {}
    for index, (key, row) in enumerate(zip(keys, rows, strict=True)):
        sums, second = take_units(row.units.shape), take_seconds(row.second_moments.shape)
        layers[key] = LayerSums(
            bins=bins[index],
            numel=numel[index],
            finite=finite[index],
            sum=total[index],
            sum_squares=squares[index],
            minimum=-low[index],
            maximum=high[index],
            units=_unit_sums(sums, numel[index] // key.units, samples[index]) if key.units else None,
            second_moments=second if second.size else None,
        )
    return layers


def _unit_sums(sums: NDArray[np.float64], observations: int, samples: int) -> UnitSums:
    nothing = np.zeros_like(sums[0])
    low, high = (sums[_LOW], sums[_HIGH]) if len(sums) > 2 else (nothing, nothing)
    return UnitSums(observations, samples, sums[_NONZERO], sums[_MAGNITUDE], low, high)


def _taker(packed: NDArray[np.float64]) -> Callable[[torch.Size], NDArray[np.float64]]:
    """Takes one array after another of a given shape from a packed one."""
    position = 0

    def take(shape: torch.Size) -> NDArray[np.float64]:
        nonlocal position
        part = packed[position : position + shape.numel()].reshape(shape)
        position += shape.numel()
        return part

    return take
