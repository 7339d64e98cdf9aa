"""The numbers of a parameter, each one declaration."""

import math
from collections.abc import Sequence

import numpy as np

from bnlightning.monitors.counting.parameters import ParameterCounts
from bnlightning.monitors.statistic import Catalogue, Statistic, Summary

# A logger's float32 could not hold more; what is not finite is left out as well.
_LARGEST = float(np.finfo(np.float32).max)
_AT_STEP = "At the sampled step: accumulated over micro-batches, reduced over ranks, unscaled, before clipping."


def parameter_catalogue() -> Catalogue[ParameterCounts, ParameterCounts]:
    """The numbers of parameters and of all gradients together, as loggers are told them."""
    return Catalogue(
        "param",
        [
            Statistic(
                "grad_norm",
                _norm,
                f"2-norm of the gradient. {_AT_STEP}",
                "Alike in all layers, over at most a few orders of magnitude.",
            ),
            Statistic(
                "grad_rms",
                _rms,
                f"Root mean square of the gradient, comparable between parameters of different sizes. {_AT_STEP}",
                "Alike in all layers, over at most a few orders of magnitude.",
            ),
            Statistic(
                "grad_nonfinite",
                _nonfinite,
                f"Share of NaN and infinities in the gradient; written only where there are any. {_AT_STEP}",
                "Never written.",
            ),
            Statistic(
                "update_ratio",
                _ratio,
                "2-norm of the step's change of the parameter over the parameter's own 2-norm before the step.",
                "About 1e-3. Above 0.1 lower the learning rate, below 1e-5 raise it.",
            ),
        ],
        _HEALTH,
        {"grad_hist": f"Histogram of the finite values of the gradient. {_AT_STEP}"},
    )


def _finite(value: float) -> float | None:
    return value if abs(value) <= _LARGEST else None


def _norm(one: ParameterCounts) -> float | None:
    return _finite(one.norm)


def _rms(one: ParameterCounts) -> float | None:
    return _finite(one.norm / math.sqrt(one.values))


def _nonfinite(one: ParameterCounts) -> float | None:
    return one.nonfinite / one.values if one.nonfinite else None


def _ratio(one: ParameterCounts) -> float | None:
    return _finite(one.update_norm / one.weight_norm) if one.weight_norm > 0 else None


def _grad_norm(parameters: Sequence[ParameterCounts]) -> float | None:
    return _finite(math.hypot(*(one.norm for one in parameters))) if parameters else None


def _update_ratio(parameters: Sequence[ParameterCounts]) -> float | None:
    weights = math.hypot(*(one.weight_norm for one in parameters))
    return _finite(math.hypot(*(one.update_norm for one in parameters)) / weights) if weights > 0 else None


def _weight_norms(parameters: Sequence[ParameterCounts]) -> list[float]:
    """The norms of the gradients of the layers' weights, the parameters of two dimensions and more."""
    return [one.norm for one in parameters if one.dims >= 2]


def _grad_zero(parameters: Sequence[ParameterCounts]) -> float | None:
    norms = _weight_norms(parameters)
    return norms.count(0.0) / len(norms) if norms else None


def _grad_norm_ratio(parameters: Sequence[ParameterCounts]) -> float | None:
    norms = _weight_norms(parameters)
    positive = [norm for norm in norms if norm > 0]
    # Beside a NaN there is no order.
    if not positive or len(positive) + norms.count(0.0) < len(norms):
        return None
    return _finite(max(positive) / min(positive))


def _grad_nonfinite(parameters: Sequence[ParameterCounts]) -> float | None:
    return sum(one.nonfinite > 0 for one in parameters) / len(parameters) if parameters else None


_HEALTH = (
    Summary[ParameterCounts](
        "grad_norm",
        _grad_norm,
        f"2-norm of all gradients together. {_AT_STEP}",
        "Steady or slowly falling. Clip the gradients where it has spikes.",
    ),
    Summary[ParameterCounts](
        "grad_norm_ratio",
        _grad_norm_ratio,
        f"Largest over smallest norm among the gradients of the layers' weights, zeros left out. {_AT_STEP}",
        "Below about 1e3. A larger one means vanishing or exploding gradients.",
    ),
    Summary[ParameterCounts](
        "grad_zero",
        _grad_zero,
        f"Share of the layers' weights whose gradient is zero everywhere. {_AT_STEP}",
        "0.",
    ),
    Summary[ParameterCounts](
        "grad_nonfinite",
        _grad_nonfinite,
        f"Share of the parameters whose gradient holds a NaN or an infinity. {_AT_STEP}",
        "0.",
    ),
    Summary[ParameterCounts](
        "update_ratio",
        _update_ratio,
        "2-norm of the step's change of all parameters over their own 2-norm before the step.",
        "About 1e-3. Above 0.1 lower the learning rate, below 1e-5 raise it.",
    ),
)
