"""Accumulators of the gradients, weights and updates of one optimizer step: one row for each parameter.

A row holds counts, sums and extrema only. The parts of a parameter that lies on several ranks therefore add up.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlightning.monitors.counting.histogram import NUM_BINS, NUM_WIDE_BINS, Histogram, count_values, finite_histogram
from bnlightning.monitors.counting.precision import counted_dtype, where_float64_is
from bnlightning.monitors.counting.ranks import is_sharded, own_part, reduce_maxima, reduce_sums

# In a sum of squares above this, squares that underflow in float32 do not matter.
_SAFE_SQUARES = 1e-30

# The columns of the counts and of the sums.
_VALUES, _NONFINITE = range(2)
_GRADIENT, _WEIGHT, _UPDATE, _FINITE, _TOTAL = range(5)


@dataclass(frozen=True)
class ParameterCounts:
    """The statistics of one parameter at one optimizer step, over all its values on all ranks.

    Args:
        dims: Number of dimensions of the parameter.
        values: Number of values of its gradient.
        nonfinite: Number of them that are NaN or infinite.
        norm: 2-norm of the gradient. Not finite if one of its values is not.
        weight_norm: 2-norm of the parameter before the step.
        update_norm: 2-norm of what the step added to the parameter.
        histogram: Histogram of the gradient's finite values. ``None`` if there are none, or it was not asked for.
    """

    dims: int
    values: int
    nonfinite: int
    norm: float
    weight_norm: float
    update_norm: float
    histogram: Histogram | None


class ParameterAccumulators:
    """One row for each parameter of a model, filled by the optimizer steps within one batch.

    Until :meth:`finish`, it holds a copy of the weights that were stepped.

    Args:
        parameters: All parameters of the model, by path. Every rank has the same paths in the same order.
        with_histogram: Paths of the parameters that get a histogram.
        device: The device of the collectives.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], with_histogram: Collection[str], device: torch.device
    ) -> None:
        self._paths = list(parameters)
        self._dims = [parameter.dim() for parameter in parameters.values()]
        self._row = {id(parameter): row for row, parameter in enumerate(parameters.values())}
        self._is_sharded = any(is_sharded(parameter) for parameter in parameters.values())
        self._device = device
        self._counts = np.zeros((len(self._paths), 2), dtype=np.int64)
        self._sums = np.zeros((len(self._paths), 5))
        # The minimum with its sign turned, so that both are maxima.
        self._extrema = np.full((len(self._paths), 2), -np.inf)
        self._num_bins = {
            row: NUM_WIDE_BINS if counted_dtype(parameter) is torch.float64 else NUM_BINS
            for row, (path, parameter) in enumerate(parameters.items())
            if path in with_histogram
        }
        self._bins: dict[int, Tensor] = {}
        self._before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def record(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Take down gradients and weights before a step. A parameter that is stepped again is taken down anew.

        Args:
            parameters: The parameters that the step is for. Those without a gradient, or not of the model, are passed
                over.
            scale: Divisor of the gradients, such as the scale of fp16. 1 leaves them as they are.
        """
        gradients, weights = {}, {}
        for parameter in parameters:
            row = self._row.get(id(parameter))
            if row is None or parameter.grad is None:
                continue
            gradient, weight = self._part(parameter.grad, parameter), self._part(parameter)
            if gradient is None or weight is None:
                continue
            values = _values(gradient)
            values = values.to(counted_dtype(values))
            # A sparse gradient may have no value stored.
            if len(values) > 0:
                gradients[row] = values if scale == 1.0 else values / scale
                weights[row] = _values(weight)
                weights[row] = weights[row].to(_at_least_float32(weights[row]), copy=True)
                self._before[row] = parameter, weights[row]
        if gradients:
            self._take_down(list(gradients), list(gradients.values()), list(weights.values()))

    def _part(self, tensor: Tensor, like: Tensor | None = None) -> Tensor | None:
        """What this rank adds to the sums over the ranks. All of it if there are none."""
        return own_part(tensor, like) if self._is_sharded else tensor

    def _take_down(self, rows: list[int], gradients: list[Tensor], weights: list[Tensor]) -> None:
        self._counts[rows, _VALUES] = [len(values) for values in gradients]
        self._sums[rows, _GRADIENT] = _square_sums(gradients)
        self._sums[rows, _WEIGHT] = _square_sums(weights)
        low, high, total = (
            _read([t for values in gradients for t in (*values.aminmax(), values.sum())]).reshape(-1, 3).T
        )
        self._counts[rows, _NONFINITE] = 0
        self._sums[rows, _FINITE], self._sums[rows, _TOTAL] = self._sums[rows, _GRADIENT], total
        self._extrema[rows] = np.stack([-low, high], axis=1)
        for row, values, one in zip(rows, gradients, total, strict=True):
            if not np.isfinite(one):
                self._take_down_finite(row, values)
            if row in self._num_bins:
                self._bins[row] = count_values(values).to(self._device)

    def _take_down_finite(self, row: int, values: Tensor) -> None:
        """Take down the moments of the finite values alone. It is needed in a run that diverges.

        The sum of the values is then not finite, because a value is not or because its dtype cannot hold the sum.
        """
        finite = values[values.isfinite()].cpu().double()
        self._counts[row, _NONFINITE] = len(values) - len(finite)
        self._sums[row, [_FINITE, _TOTAL]] = finite.dot(finite).item(), finite.sum().item()
        self._extrema[row] = (-finite.min().item(), finite.max().item()) if len(finite) > 0 else -np.inf

    def finish(self) -> None:
        """Take down what the steps made of the weights, drop the copies, and add up the rows of all ranks.

        With sharded parameters every rank must call it. It then takes three collectives, however many parameters there
        are. Without sharded parameters it takes none.
        """
        before, self._before = self._before, {}
        updates = [weights.sub_(_values(self._part(parameter))) for parameter, weights in before.values()]
        if updates:
            self._sums[list(before), _UPDATE] = _square_sums(updates)
        if self._is_sharded:
            arrays = (self._counts, self._sums, self._extrema)
            counts, sums, extrema = (torch.from_numpy(array).to(self._device) for array in arrays)
            bins = [self._bins.get(row, self._no_bins(number)) for row, number in self._num_bins.items()]
            counts, sums, *bins = reduce_sums([counts, sums, *bins])
            self._bins = dict(zip(self._num_bins, bins, strict=True))
            (extrema,) = reduce_maxima([extrema])
            self._counts, self._sums, self._extrema = (tensor.cpu().numpy() for tensor in (counts, sums, extrema))

    def _no_bins(self, number: int) -> Tensor:
        return torch.zeros(number, dtype=torch.int64, device=self._device)

    def statistics(self) -> dict[str, ParameterCounts]:
        """The statistics of the parameters that were recorded, by path."""
        # In one transfer.
        packed = torch.cat([self._no_bins(0), *self._bins.values()]).cpu().numpy()
        ends = np.cumsum([len(bins) for bins in self._bins.values()]).tolist()
        bins = dict(zip(self._bins, np.split(packed, ends), strict=False))
        norms = np.sqrt(self._sums[:, [_GRADIENT, _WEIGHT, _UPDATE]]).tolist()
        found = {}
        for row, (path, (values, nonfinite)) in enumerate(zip(self._paths, self._counts.tolist(), strict=True)):
            if values == 0:
                continue
            histogram = None
            if row in bins and nonfinite < values:
                low, high = self._extrema[row].tolist()
                squares, total = self._sums[row, [_FINITE, _TOTAL]].tolist()
                histogram = finite_histogram(bins[row], -low, high, total, squares)
            norm, weight_norm, update_norm = norms[row]
            found[path] = ParameterCounts(self._dims[row], values, nonfinite, norm, weight_norm, update_norm, histogram)
        return found


def _values(tensor: Tensor | None) -> Tensor:
    """All values in one dimension, in an order that depends on the strides only. A view if they are dense.

    A sparse tensor gives the values that it stores. A complex tensor gives real and imaginary parts.
    """
    assert tensor is not None
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # Without the permutation, a gradient in the channels_last format would have to be copied.
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).reshape(-1)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _square_sums(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """The sum of the squares of each tensor, over the whole range of its dtype. NaN or infinite if a value is."""
    # Neither norms nor dot products: on a CPU these lose digits over many values, and take longer.
    squares = _read([tensor.to(counted_dtype(tensor)).square().sum() for tensor in tensors])
    # Overflow and underflow are rare, so this may be slow.
    unsafe = np.flatnonzero(~((squares > _SAFE_SQUARES) & np.isfinite(squares))).tolist()
    if unsafe:
        exact = [where_float64_is(tensors[index]) for index in unsafe]
        squares[unsafe] = _read(torch._foreach_norm(exact, 2, torch.float64)) ** 2
    return squares


def _read(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """The numbers of all tensors, one after the other, read in one transfer."""
    device = tensors[0].device
    return torch.cat([tensor.reshape(-1).to(device) for tensor in tensors]).cpu().double().numpy()
