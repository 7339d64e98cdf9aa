"""The numbers of a parameter, each one declaration."""

import math
from collections.abc import Sequence

import numpy as np

from bnlightning.monitors.counting.parameters import ParameterCounts
from bnlightning.monitors.statistic import Alarm, Catalogue, Look, Statistic, Summary

# A logger's float32 could not hold more. Values that are not finite are left out as well.
_LARGEST = float(np.finfo(np.float32).max)
_AT_STEP = (
    "The gradient is that of the sampled step, over all micro-batches and ranks, without the scale of fp16, before "
    "clipping."
)
_ALL = "All parameters with a gradient count, also those that have no charts of their own."
_ALIKE = (
    "Within a few orders of magnitude in all layers. Far smaller in the first layers than in the last: gradients "
    "vanish. Far larger: they explode. Try a normalisation or another initialisation."
)
_NONFINITE_HEALTH = "Try a lower learning rate, a warm-up or clipping. With fp16, a few in the first steps are usual."
_RATIO_HEALTH = "About 1e-3. Above 0.1 lower the learning rate, below 1e-5 raise it."


def parameter_catalogue() -> Catalogue[ParameterCounts, ParameterCounts]:
    """The numbers of single parameters and of all of them together, with their descriptions."""
    return Catalogue(
        "param",
        [
            Statistic(
                "grad_norm",
                _norm,
                f"2-norm of the parameter's gradient. {_AT_STEP}",
                _ALIKE,
                look=Look(
                    "gradient, beside the last layer's",
                    "two_sided",
                    1e-9,
                    1e9,
                    {1e-9: "1e-9", 1e-3: "1e-3", 1.0: "1", 1e3: "1e3", 1e9: "1e9"},
                    log=True,
                    healthy=(1e-3, 1e3),
                    relative=True,
                ),
                alarm=Alarm(
                    "the norm of the gradient is {value} times {side} than that of the last layer",
                    "a normalisation, He or Xavier initialisation, or residual connections, and clipping where it is "
                    "larger",
                    zero="the gradient is zero, so that the layer learns nothing",
                ),
            ),
            Statistic(
                "grad_rms",
                _rms,
                "Root mean square of the parameter's gradient, comparable between parameters of different sizes. "
                f"{_AT_STEP}",
                _ALIKE,
            ),
            Statistic(
                "grad_nonfinite",
                _nonfinite,
                "Share of NaN and infinities in the parameter's gradient. Written only where there are any. "
                f"{_AT_STEP}",
                f"This chart does not exist. {_NONFINITE_HEALTH}",
                look=Look("NaN or inf", ticks={}, absent=0.0),
                alarm=Alarm(
                    "of the gradient's values are NaN or infinite",
                    "a lower learning rate, a warm-up, clipping, or bf16 in the place of fp16",
                ),
            ),
            Statistic(
                "update_ratio",
                _ratio,
                "2-norm of the change that the sampled step makes to the parameter, divided by the parameter's 2-norm "
                "before the step. Momentum, weight decay and clipping are in it.",
                _RATIO_HEALTH,
                look=Look(
                    "update, beside the weight",
                    "two_sided",
                    1e-9,
                    10.0,
                    {1e-9: "1e-9", 1e-5: "1e-5", 0.1: "0.1", 10.0: "10"},
                    log=True,
                    healthy=(1e-5, 0.1),
                ),
                alarm=Alarm(
                    "the norm of the update is {value} times that of the weight",
                    "a lower learning rate, a warm-up, or clipping",
                ),
            ),
        ],
        _HEALTH,
        {
            "grad_hist": "Histogram of the finite values of the parameter's gradient. Far outliers are counted in the "
            f"outermost bin. {_AT_STEP} Healthy: {_ALIKE}"
        },
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
    """The gradient norms of the layers' weights, which are the parameters of two and more dimensions."""
    return [one.norm for one in parameters if one.dims >= 2]


def _grad_zero(parameters: Sequence[ParameterCounts]) -> float | None:
    norms = _weight_norms(parameters)
    return norms.count(0.0) / len(norms) if norms else None


def _grad_norm_ratio(parameters: Sequence[ParameterCounts]) -> float | None:
    norms = _weight_norms(parameters)
    positive = [norm for norm in norms if norm > 0]
    # A NaN can be neither the largest nor the smallest.
    if not positive or len(positive) + norms.count(0.0) < len(norms):
        return None
    return _finite(max(positive) / min(positive))


def _grad_nonfinite(parameters: Sequence[ParameterCounts]) -> float | None:
    return sum(one.nonfinite > 0 for one in parameters) / len(parameters) if parameters else None


_HEALTH = (
    Summary[ParameterCounts](
        "grad_norm",
        _grad_norm,
        f"2-norm of all gradients together. {_AT_STEP} {_ALL}",
        "Steady or slowly falling. Clip the gradients where it has spikes.",
    ),
    Summary[ParameterCounts](
        "grad_norm_ratio",
        _grad_norm_ratio,
        "Largest gradient norm divided by the smallest one, among the weights of two and more dimensions. Norms of "
        f"zero are left out. {_AT_STEP} {_ALL}",
        "Below about 1e3. A larger one means vanishing or exploding gradients. `param_grad_norm` shows which layers it "
        "is.",
    ),
    Summary[ParameterCounts](
        "grad_zero",
        _grad_zero,
        f"Share of the weights, of two and more dimensions, whose gradient is zero everywhere. {_AT_STEP} {_ALL}",
        "0. Such a layer learns nothing at the step: what follows it may be dead, saturated or detached.",
    ),
    Summary[ParameterCounts](
        "grad_nonfinite",
        _grad_nonfinite,
        f"Share of the parameters whose gradient holds a NaN or an infinity. {_AT_STEP} {_ALL}",
        f"0. {_NONFINITE_HEALTH}",
    ),
    Summary[ParameterCounts](
        "update_ratio",
        _update_ratio,
        "2-norm of the change that the sampled step makes to all parameters together, divided by their 2-norm before "
        f"the step. Momentum, weight decay and clipping are in it. {_ALL}",
        _RATIO_HEALTH,
    ),
)
