"""Accumulators of what layers put out.

Every accumulator is a sum or a maximum. The result is therefore exact over calls, micro-batches, steps and ranks. The
accumulators lie on the device and are read once, when a sample is closed. A layer takes 33 kB, and 40 bytes for each of
its units. One of float64 takes 262 kB.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnlightning.monitors.counting.histogram import NUM_BINS, NUM_WIDE_BINS, count_values
from bnlightning.monitors.counting.precision import real_dtype
from bnlightning.monitors.counting.ranks import all_keys, reduce_maxima, reduce_sums
from bnlightning.monitors.words import Mishaps

Limits = tuple[float, float]
Number = float | Tensor
Scalar = TypeVar("Scalar", np.int64, np.float64)


@dataclass(frozen=True)
class _Range:
    """What values of a dtype can stand.

    Args:
        safe: Magnitudes from this to its inverse have squares that are added up without loss.
        shift: Largest shift, which may be subtracted from any value.
        exponent: Smallest exponent of two that has an inverse.
    """

    safe: float
    shift: float
    exponent: int


_RANGES = {torch.float32: _Range(1e-10, 2.0**100, -120), torch.float64: _Range(1e-140, 2.0**1000, -1000)}

_NONZERO, _MAGNITUDE, _FIRED, _LOW, _HIGH = range(5)


@dataclass(frozen=True)
class LayerKey:
    """Identifies the accumulators of one layer, on every rank alike.

    Args:
        label: Path of the module with the number of the call and the place in the output, as in tags.
        is_activation: Whether the layer counts under ``health/``.
        units: Number of units. 0 where units are not looked at.
        limits: The values beyond which an output counts as saturated. ``None`` for an unbounded activation.
        is_gradient: Whether the values are gradients of the layer's output, not the output itself.
        is_wide: Whether the values are counted in float64, because float32 cannot hold them.
    """

    label: str
    is_activation: bool = False
    units: int = 0
    limits: Limits | None = None
    is_gradient: bool = False
    is_wide: bool = False


@dataclass(frozen=True)
class Sum:
    """An accumulator that a statistic brings with it.

    Args:
        name: Its name in :attr:`LayerSums.sums`.
        shape: Returns its shape for a layer. ``None`` leaves the layer out.
        of: Returns what one call adds, of that shape and any floating dtype. Called without gradients.
        is_maximum: Whether the maximum over calls and ranks is kept instead of the sum.

    Example:
        >>> fourth_powers = Sum("fourth_powers", lambda key: (), lambda call: call.fill(0.0).pow(4).sum())
    """

    name: str
    shape: Callable[[LayerKey], tuple[int, ...] | None]
    of: Callable[["CallValues"], Tensor]
    is_maximum: bool = False


@dataclass(frozen=True)
class UnitSums:
    """Sums over the samples and positions of a window, for each unit: float64 of shape ``(units,)``.

    Args:
        observations: Number of samples times positions, the other dimensions. It is the same for all units.
        samples: Number of samples: the sizes of the batches, added up.
        nonzero: Number of values that are not zero. Non-finite values count as non-zero.
        magnitude: Sum of the absolute finite values.
        fired: Number of samples with a value that is not zero at any position.
        low: Number of finite values below the activation's limits. Zeros for an unbounded activation.
        high: Number of finite values above the activation's limits, likewise.
    """

    observations: int
    samples: int
    nonzero: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    fired: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def __add__(self, other: "UnitSums") -> "UnitSums":
        return UnitSums(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class LayerSums:
    """The sums over a layer's values, over one sample of the monitor and all ranks.

    Args:
        bins: Counts by :func:`bnlightning.monitors.counting.histogram.count_values`.
        numel: Number of values.
        finite: Number of finite values.
        sum: Sum of the finite values.
        sum_squares: Sum of the squares of the finite values.
        squares_about_mean: Sum of the squares of their distances from their mean. It keeps the digits of a small
            variance.
        minimum: Smallest finite value. Infinity if there is none.
        maximum: Largest finite value. Minus infinity if there is none.
        units: Sums of each unit. ``None`` where units are not looked at.
        sums: The statistics' own accumulators, by the name of the :class:`Sum`.
    """

    bins: NDArray[np.int64]
    numel: int
    finite: int
    sum: float
    sum_squares: float
    squares_about_mean: float
    minimum: float
    maximum: float
    units: UnitSums | None
    sums: Mapping[str, NDArray[np.float64]]


class LayerAccumulators:
    """Accumulators for any number of layers. Those of a layer are made when it is first seen.

    Args:
        sums: The accumulators that statistics bring with them.
        mishaps: Tells the error of such an accumulator, which then holds NaN. ``None``: there is one for this object.

    Example:
        >>> accumulators = LayerAccumulators()
        >>> accumulators.update(LayerKey("net.act"), torch.tensor([[1.0, 2.0], [3.0, torch.nan]]))
        >>> sums = accumulators.reduce(torch.device("cpu"))[LayerKey("net.act")]
        >>> sums.numel, sums.finite, sums.sum
        (4, 3, 6.0)
    """

    def __init__(self, sums: Sequence[Sum] = (), mishaps: Mishaps | None = None) -> None:
        self._sums = tuple(sums)
        self._mishaps = mishaps or Mishaps()
        self._rows: dict[LayerKey, _Row] = {}

    def __len__(self) -> int:
        return sum(row.seen for row in self._rows.values())

    def reset(self) -> None:
        """Set all accumulators to their start. The layers stay known."""
        for row in self._rows.values():
            row.reset()

    def update(self, key: LayerKey, values: Tensor, unit_dim: int = -1, lengths: tuple[int, ...] | None = None) -> None:
        """Add the values of one call of a layer.

        Args:
            key: The layer.
            values: Any shape and floating dtype.
            unit_dim: Dimension of the units, if the key has any. By default the last.
            lengths: Number of rows of each sample. ``None``: each row is a sample.
        """
        row = self._rows.get(key)
        if row is None:
            # Evaluations run in inference mode, whose tensors cannot be changed later.
            with torch.inference_mode(False):
                row = self._rows[key] = _Row(key, values.device, self._sums, self._mishaps)
        if values.numel():
            row.update(CallValues(values, unit_dim, torch.float64 if key.is_wide else torch.float32, lengths))

    def reduce(self, device: torch.device) -> dict[LayerKey, LayerSums]:
        """The sums over all ranks, for every layer that ran on any rank. All ranks get the same.

        It takes four collectives, however many layers there are. Every rank must call it.

        Args:
            device: The device of the collectives.
        """
        keys = all_keys([key for key, row in self._rows.items() if row.seen], device)
        if not keys:
            return {}
        with torch.no_grad(), torch.inference_mode(False):
            rows = [self._rows.get(key) or _Row(key, device, self._sums, self._mishaps) for key in keys]
            # The minimum with its sign turned, so that both are maxima.
            extrema = _table([[-row.minimum, row.maximum] for row in rows], real_dtype(device), device)
            units = torch.cat([row.units.flatten() for row in rows])
            largest = _packed([row.sums[each.name] for row in rows for each in row.own if each.is_maximum], units)
            extrema, largest = reduce_maxima([extrema, largest])
            bins = torch.cat([row.bins for row in rows])
            counts = _table([[row.finite, row.samples, row.numel] for row in rows], torch.int64, device)
            moments = _moments(rows, extrema, device)
            own = _packed([row.sums[each.name] for row in rows for each in row.own if not each.is_maximum], units)
            bins, counts, moments, units, own = reduce_sums([bins, counts, moments, units, own])
        read = (each.cpu().numpy() for each in (bins, counts, moments, extrema, units, own, largest))
        return _split(keys, rows, *read)


class _Row:
    """Accumulators of one layer. Numbers are floats on a CPU, and tensors elsewhere, so that nothing waits for them."""

    def __init__(
        self, key: LayerKey, device: torch.device, sums: Sequence[Sum], mishaps: Mishaps | None = None
    ) -> None:
        self.key = key
        self._mishaps = mishaps = mishaps or Mishaps()
        self.seen = False
        real = real_dtype(device)
        self.bins = torch.zeros(NUM_WIDE_BINS if key.is_wide else NUM_BINS, dtype=torch.int64, device=device)
        number = 0 if not key.units else 5 if key.limits else 3
        self.units = torch.zeros(number, key.units, dtype=real, device=device)
        self._unit_sums = self.units.unbind()
        shapes: dict[Sum, tuple[int, ...] | None] = {}
        for each in sums:
            with mishaps.forgiven(f"find the shape of the sum {each.name!r}"):
                shapes[each] = each.shape(key)
        self.own = [each for each, shape in shapes.items() if shape is not None]
        self.sums = {
            each.name: torch.full(shape, _start(each), dtype=real, device=device)
            for each, shape in shapes.items()
            if shape is not None
        }
        # It is subtracted before values are summed. Squares about zero would lose the digits of a small variance.
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
            for each in self.own:
                self.sums[each.name].fill_(_start(each))
            self.samples = self.numel = self.finite = 0
            self.total = self.squares = 0.0
            self.minimum, self.maximum = math.inf, -math.inf

    def update(self, values: "CallValues") -> None:
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
        for each in self.own:
            self._update_own(each, values)

    def _update_moments(self, values: "CallValues") -> None:
        if self.shift is None:
            self.shift = _middle(values)
        shift, scale = self.shift, values.scale()
        shifted = values.fill(shift) - shift if scale is None else values.fill(shift) * scale - shift * scale
        flat = shifted.view(-1)
        total, squares = values.read(flat.sum()), values.read(torch.dot(flat, flat))
        self.total = self.total + (total if scale is None else total / scale)
        self.squares = self.squares + (squares if scale is None else squares / scale / scale)

    def _update_units(self, values: "CallValues") -> None:
        # On a CPU, signs and sums of floats are several times as fast as comparisons and sums of booleans.
        magnitude = values.fill(0.0).abs()
        self._unit_sums[_MAGNITUDE].add_(values.sum_by_unit(magnitude))
        nonzero = magnitude.sign_()
        if values.finite is not None:
            nonzero = torch.where(values.finite, nonzero, 1.0)
        by_sample = values.sum_by_sample(nonzero)
        number = values.sum_of_samples(by_sample)
        self._unit_sums[_NONZERO].add_(number)
        # Without positions, every sample has one value for a unit.
        fired = number if by_sample is nonzero else values.sum_of_samples(by_sample.clamp_(max=1.0))
        self._unit_sums[_FIRED].add_(fired)
        if self.key.limits is not None:
            low, high = self.key.limits
            between = values.fill((max(low, -1e30) + min(high, 1e30)) / 2)
            self._unit_sums[_LOW].add_(values.sum_by_unit((low - between).sign_().clamp_min_(0.0)))
            self._unit_sums[_HIGH].add_(values.sum_by_unit((between - high).sign_().clamp_min_(0.0)))

    def _update_own(self, own: Sum, values: "CallValues") -> None:
        total = self.sums[own.name]
        with self._mishaps.forgiven(f"add up the sum {own.name!r}"):
            with torch.autocast(total.device.type, enabled=False):
                added = own.of(values).to(total)
            if own.is_maximum:
                torch.maximum(total, added, out=total)
            else:
                total.add_(added)
            return
        # All ranks still reduce it. What is missing must not look like a number.
        total.fill_(math.nan)


class CallValues:
    """The values of one call of a layer, ready to be counted.

    Attributes:
        x: The values, contiguous, of two or more dimensions and at least one value. float32, or float64 where the
            layer puts that out.
        unit_dim: Dimension of the units in ``x``.
        samples: Size of the batch.
        finite: Which values are finite, bool of the shape of ``x``. ``None`` if all are known to be.
        num_finite: Number of finite values.
        minimum: Smallest finite value.
        maximum: Largest finite value.
    """

    def __init__(
        self, values: Tensor, unit_dim: int, dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] | None = None
    ) -> None:
        x = values.detach().to(dtype)
        if x.dim() < 2:
            # A single unit, with as many samples as values.
            x, unit_dim = x.reshape(-1, 1), 1
        self.samples = len(x) if lengths is None else len(lengths)
        self._lengths = lengths
        self.range = _RANGES[dtype]
        self.unit_dim = unit_dim % x.dim()
        if not x.is_contiguous():
            x = self._made_contiguous(x)
        self.x = x
        self._others = [dim for dim in range(x.dim()) if dim != self.unit_dim]
        self._positions = self._others[1:]
        self.finite: Tensor | None = None
        self.num_finite: Number = x.numel()
        self.minimum: Number
        self.maximum: Number
        if x.device.type == "cpu":
            # Reading from a CPU costs no waiting. A GPU would have to be waited for.
            low, high = torch.aminmax(x)
            self.minimum, self.maximum = low.item(), high.item()
            if math.isfinite(self.minimum) and math.isfinite(self.maximum):
                return
        self.finite = x.isfinite()
        self.num_finite = self.read(self.finite.sum())
        self.minimum = self.read(torch.where(self.finite, x, math.inf).amin())
        self.maximum = self.read(torch.where(self.finite, x, -math.inf).amax())

    def read(self, number: Tensor) -> Number:
        """A result as a float on a CPU, and as a tensor where a float would need waiting."""
        return number.item() if self.x.device.type == "cpu" else number.to(real_dtype(self.x.device))

    def fill(self, value: Number) -> Tensor:
        """The values, with ``value`` in the place of every non-finite one."""
        return self.x if self.finite is None else torch.where(self.finite, self.x, value)

    def scale(self) -> Number | None:
        """A power of two that brings the values near to 1, so that squares neither overflow nor vanish in their dtype.

        ``None`` on a CPU if there is no need.
        """
        extent = _larger(self.maximum, -self.minimum)
        if isinstance(extent, float):
            if self.range.safe < extent < 1 / self.range.safe or not 0 < extent < math.inf:
                return None
            return math.ldexp(1.0, -max(math.frexp(extent)[1], self.range.exponent))
        exponent = torch.frexp(extent.nan_to_num(posinf=1.0, neginf=1.0).clamp_min(2.0**self.range.exponent))[1]
        return torch.ldexp(torch.ones_like(extent), -exponent)

    def by_unit(self, values: Tensor) -> Tensor:
        """The values as a matrix of shape ``(observations, units)``."""
        return values.movedim(self.unit_dim, -1).flatten(0, -2)

    def sum_by_unit(self, values: Tensor) -> Tensor:
        """Sums over all dimensions but that of the units, shape ``(units,)``."""
        return values.sum(self._others, dtype=self._dtype_of_counts())

    def sum_by_sample(self, values: Tensor) -> Tensor:
        """Sums over the positions of each sample, shape ``(samples, units)``."""
        by_row = values.sum(self._positions) if self._positions else values
        if self._lengths is None:
            return by_row
        return torch.stack([rows.sum(0) for rows in by_row.split(self._lengths)])

    def sum_of_samples(self, values: Tensor) -> Tensor:
        """Sums over the samples of counts by sample and unit, shape ``(units,)``."""
        return values.sum(0, dtype=self._dtype_of_counts())

    def _dtype_of_counts(self) -> torch.dtype | None:
        # float32 holds counts up to 2^24 exactly.
        is_large = self.x.numel() > 2**24 * self.x.shape[self.unit_dim]
        return real_dtype(self.x.device) if is_large else None

    def _made_contiguous(self, x: Tensor) -> Tensor:
        if x.dim() > 3 and x.movedim(1, -1).is_contiguous():
            # channels_last: the same memory, in its own order.
            self.unit_dim = x.dim() - 1 if self.unit_dim == 1 else self.unit_dim - (self.unit_dim > 1)
            return x.movedim(1, -1)
        return x.contiguous()


def _middle(values: CallValues) -> Number:
    """A number near the mean of the finite values. 0 if there are none."""
    # The sum may overflow. So may a value minus the shift, if the shift is huge.
    mean = (values.fill(0.0).sum() / values.num_finite).nan_to_num(nan=0.0)
    return values.read(mean.clamp(-values.range.shift, values.range.shift))


def _smaller(one: Number, other: Number) -> Number:
    return torch.clamp(other, max=one) if isinstance(other, Tensor) else min(one, other)


def _larger(one: Number, other: Number) -> Number:
    return torch.clamp(other, min=one) if isinstance(other, Tensor) else max(one, other)


def _table(numbers: Sequence[Sequence[Number]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor of shape ``(rows, columns)``, in a few operations for each column, however many rows."""
    return torch.stack([_column(column, dtype, device) for column in zip(*numbers, strict=True)], dim=1)


def _column(numbers: Sequence[Number], dtype: torch.dtype, device: torch.device) -> Tensor:
    like = next((number for number in numbers if isinstance(number, Tensor)), None)
    if like is None:
        # All at once: one by one, a GPU would be waited for each time.
        return torch.tensor(numbers, dtype=dtype, device=device)
    tensors = [number if isinstance(number, Tensor) else like.new_tensor(number) for number in numbers]
    return torch.stack(tensors).to(device, dtype)


def _moments(rows: Sequence[_Row], extrema: Tensor, device: torch.device) -> Tensor:
    """The sums of the finite values of each row and of their squares, about the row's centre, shape ``(rows, 2)``."""
    numbers = [[row.finite, 0.0 if row.shift is None else row.shift, row.total, row.squares] for row in rows]
    finite, shift, total, squares = _table(numbers, extrema.dtype, device).unbind(1)
    # Each rank has chosen a shift of its own. The centre is the same on all, and lies among the values.
    shift = shift - _centre(extrema)
    return torch.stack([total + finite * shift, squares + 2 * shift * total + finite * shift**2], dim=1)


def _centre(extrema: Tensor) -> Tensor:
    """The middle between minimum and maximum of each row, shape ``(rows,)``. 0 where there is no finite value."""
    low, high = extrema.unbind(1)
    return torch.nan_to_num(high / 2 - low / 2, 0.0, 0.0, 0.0)


def _split(
    keys: list[LayerKey],
    rows: list[_Row],
    bins: NDArray[np.int64],
    counts: NDArray[np.int64],
    moments: NDArray[np.float64],
    extrema: NDArray[np.float64],
    units: NDArray[np.float64],
    own: NDArray[np.float64],
    largest: NDArray[np.float64],
) -> dict[LayerKey, LayerSums]:
    take_units, take_own, take_largest, take_bins = _taker(units), _taker(own), _taker(largest), _taker(bins)
    finite, samples, numel = counts.T.tolist()
    (total, squares), (low, high) = moments.T.tolist(), extrema.T.tolist()
    centres = _centre(torch.from_numpy(extrema)).tolist()
    layers = {}
    for index, (key, row) in enumerate(zip(keys, rows, strict=True)):
        sums, centre = take_units(row.units.shape), centres[index]
        layers[key] = LayerSums(
            bins=take_bins(row.bins.shape),
            numel=numel[index],
            finite=finite[index],
            sum=total[index] + finite[index] * centre,
            sum_squares=squares[index] + 2 * centre * total[index] + finite[index] * centre * centre,
            squares_about_mean=max(squares[index] - total[index] * (total[index] / max(finite[index], 1)), 0.0),
            minimum=-low[index],
            maximum=high[index],
            units=_unit_sums(sums, numel[index] // key.units, samples[index]) if key.units else None,
            sums={
                each.name: (take_largest if each.is_maximum else take_own)(row.sums[each.name].shape)
                for each in row.own
            },
        )
    return layers


def _start(own: Sum) -> float:
    return -math.inf if own.is_maximum else 0.0


def _packed(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_zeros(0), *(tensor.flatten() for tensor in tensors)])


def _unit_sums(sums: NDArray[np.float64], observations: int, samples: int) -> UnitSums:
    nothing = np.zeros_like(sums[0])
    low, high = (sums[_LOW], sums[_HIGH]) if len(sums) > _LOW else (nothing, nothing)
    return UnitSums(observations, samples, sums[_NONZERO], sums[_MAGNITUDE], sums[_FIRED], low, high)


def _taker(packed: NDArray[Scalar]) -> Callable[[torch.Size], NDArray[Scalar]]:
    """A function that takes one array after another, each of a given shape, from a packed one."""
    position = 0

    def take(shape: torch.Size) -> NDArray[Scalar]:
        nonlocal position
        part = packed[position : position + shape.numel()].reshape(shape)
        position += shape.numel()
        return part

    return take
