"""The numbers of a layer, each one declaration. A new number is one more entry of :func:`layer_statistics`.

Shares are in [0, 1]. A function returns ``None`` where its number does not exist, for lack of finite values or units.
Descriptions and what is healthy are Markdown, which TensorBoard shows behind the (i) of a chart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bnlightning.monitors.counting.histogram import num_zero
from bnlightning.monitors.counting.layers import CallValues, LayerKey, LayerSums, Sum, UnitSums
from bnlightning.monitors.counting.precision import real_dtype
from bnlightning.monitors.record import Entry
from bnlightning.monitors.statistic import Alarm, Catalogue, Look, Statistic, Summary

RARELY = 0.01
"""A unit is rarely active if it is non-zero for less than this share of the samples (Dohare et al., Nature 2024)."""
ALMOST_ALWAYS = 0.95
"""A unit counts as saturated if it is saturated for at least this share of the samples."""
MAX_UNITS_OF_RANK = 1024
"""Layers with more units have no effective rank: their matrix of second moments would be too large."""

_OF_STEP = "Over the finite outputs of all micro-batches and ranks, of the sampled step or of the whole evaluation."
_OF_WINDOW = (
    "In training over the window: the last `window_samples` (1000 by default) samples of the sampled steps, or up to "
    "twice as many. In an evaluation over all of its samples. All ranks together."
)
_OF_SILENCE = (
    "A unit that used to fire for a share f of the samples is dead after n silent samples in a row, with (1 - f)^n "
    "below 1 %. One that has never fired is dead after 459. In an evaluation of at least 459 samples, a unit is dead "
    "that is zero for all of them. All ranks together."
)


@dataclass(frozen=True)
class LayerCounts:
    """The sums that were counted for one layer, over all ranks.

    Args:
        key: The layer.
        values: Sums over the sampled step, or over the whole evaluation.
        units: Sums of the units over the window of samples. ``None`` where units are not looked at.
        dead: Which units are dead, by :mod:`bnlightning.monitors.counting.firing`, bool of shape ``(units,)``. ``None``
            where units are not looked at.
    """

    key: LayerKey
    values: LayerSums
    units: UnitSums | None = None
    dead: NDArray[np.bool_] | None = None


def mean(layer: LayerSums) -> float | None:
    """Mean of the finite values."""
    return layer.sum / layer.finite if layer.finite else None


def std(layer: LayerSums) -> float | None:
    """Population standard deviation of the finite values."""
    if not layer.finite:
        return None
    return math.sqrt(layer.squares_about_mean / layer.finite)


def minimum(layer: LayerSums) -> float | None:
    """Smallest finite value."""
    return layer.minimum if layer.minimum <= layer.maximum else None


def maximum(layer: LayerSums) -> float | None:
    """Largest finite value."""
    return layer.maximum if layer.minimum <= layer.maximum else None


def zero(layer: LayerSums) -> float | None:
    """Share of zeros among the finite values. A magnitude below 2^-129 counts as zero, or below 2^-1025 of float64."""
    return num_zero(layer.bins) / layer.finite if layer.finite else None


def nonfinite(layer: LayerSums) -> float:
    """Share of NaN and infinities among all values."""
    return 1.0 - layer.finite / layer.numel


def saturated_low(layer: LayerSums) -> float | None:
    """Share of the finite values below the activation's limits."""
    return _share_of_finite(layer, lambda units: units.low)


def saturated_high(layer: LayerSums) -> float | None:
    """Share of the finite values above the activation's limits."""
    return _share_of_finite(layer, lambda units: units.high)


def saturated(layer: LayerSums) -> float | None:
    """Share of the finite values beyond the activation's limits, on either side."""
    return _share_of_finite(layer, lambda units: units.low + units.high)


def effective_rank(layer: LayerSums) -> float | None:
    r"""Effective rank of the matrix of observations by units: ``exp(-sum_k p_k log p_k)``, ``p = sigma / sum(sigma)``.

    ``sigma`` are the singular values of the matrix (Roy & Vetterli, EUSIPCO 2007). The matrix is not centred. The rank
    is at least 1, and at most the number of units and of observations.
    """
    second_moments = layer.sums.get(SECOND_MOMENTS.name)
    if second_moments is None:
        return None
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(second_moments), 0.0, None))
    # Rounding turns zeros into tiny values, which would count as many small directions.
    shares = singular[singular > 1e-5 * singular.max(initial=0.0)]
    if not len(shares):
        return None
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dormant(units: UnitSums, tau: float) -> NDArray[np.bool_]:
    """Which units are tau-dormant: their mean magnitude is at most ``tau`` times the layer's (Sokar et al., ICML 2023).

    A unit's magnitude is the mean of its absolute values over samples and positions. The layer's magnitude is the mean
    over its units. All units of a layer of zeros are dormant. A unit without a finite value is not.

    Args:
        units: The sums of the units.
        tau: Share of the layer's magnitude up to which a unit is dormant.

    Returns:
        bool of shape ``(units,)``.
    """
    broken = (units.magnitude == 0) & (units.nonzero > 0)
    is_small: NDArray[np.bool_] = units.magnitude <= tau * units.magnitude.mean()
    found: NDArray[np.bool_] = is_small & ~broken
    return found


def rarely_active(units: UnitSums) -> NDArray[np.bool_]:
    """Which units were non-zero for less than :data:`RARELY` of the samples and positions, bool ``(units,)``."""
    return np.less(units.nonzero, RARELY * units.observations)


def always_saturated(units: UnitSums) -> NDArray[np.bool_]:
    """Which units were beyond the limits for at least :data:`ALMOST_ALWAYS` of samples and positions.

    Returns:
        bool of shape ``(units,)``.
    """
    return np.greater_equal(units.low + units.high, ALMOST_ALWAYS * units.observations)


# Classes instead of lambdas: callbacks hold declarations, and are pickled for processes that are spawned.


@dataclass(frozen=True)
class _OfValues:
    of: Callable[[LayerSums], float | None]

    def __call__(self, layer: LayerCounts) -> float | None:
        return self.of(layer.values)


@dataclass(frozen=True)
class _ShareOfUnits:
    which: Callable[[UnitSums], NDArray[np.bool_]]

    def __call__(self, layer: LayerCounts) -> float | None:
        return None if layer.units is None else _share(self.which(layer.units))


@dataclass(frozen=True)
class _WithDead:
    """Dead units are among the others at once, and not only when the window holds nothing else."""

    which: Callable[[UnitSums], NDArray[np.bool_]]

    def __call__(self, layer: LayerCounts) -> float | None:
        if layer.units is None:
            return None
        marked = self.which(layer.units)
        return _share(marked if layer.dead is None else marked | layer.dead)


@dataclass(frozen=True)
class _WhereBounded:
    of: Callable[[LayerCounts], float | None]

    def __call__(self, layer: LayerCounts) -> float | None:
        return self.of(layer) if layer.key.limits is not None else None


@dataclass(frozen=True)
class _OverUnits:
    """The share among the units of all activations: the layers' shares, weighted by their numbers of units."""

    name: str

    def __call__(self, layers: Sequence[Entry]) -> float | None:
        having = [layer for layer in layers if self.name in layer.numbers]
        units = sum(layer.units for layer in having)
        return sum(layer.numbers[self.name] * layer.units for layer in having) / units if units else None


@dataclass(frozen=True)
class _OverLayers:
    """The mean over the activations that have the number, each with the same weight."""

    name: str

    def __call__(self, layers: Sequence[Entry]) -> float | None:
        values = [layer.numbers[self.name] for layer in layers if self.name in layer.numbers]
        return sum(values) / len(values) if values else None


def _share_of_dead(layer: LayerCounts) -> float | None:
    return None if layer.dead is None else _share(layer.dead)


def _share(marked: NDArray[np.bool_]) -> float:
    return np.count_nonzero(marked) / len(marked)


def _worst_dead(layers: Sequence[Entry]) -> float | None:
    return max((layer.numbers["dead"] for layer in layers if "dead" in layer.numbers), default=None)


def _matrix_shape(key: LayerKey) -> tuple[int, int] | None:
    return (key.units, key.units) if 0 < key.units <= MAX_UNITS_OF_RANK and not key.is_gradient else None


def _second_moments(call: CallValues) -> Tensor:
    matrix = call.by_unit(call.fill(0.0)).to(real_dtype(call.x.device))
    return matrix.T @ matrix


SECOND_MOMENTS = Sum("second_moments", _matrix_shape, _second_moments)
"""``X^T X`` of the finite values as a matrix of observations by units."""

EFFECTIVE_RANK = Statistic[LayerCounts](
    "effective_rank",
    _OfValues(effective_rank),
    "Effective rank of the matrix of samples and positions by units (Roy & Vetterli, 2007): how many directions the "
    f"outputs use. {_OF_STEP} It says little unless there are many more samples than units.",
    "A large part of the number of units. A falling rank means that units become copies of each other.",
    sum=SECOND_MOMENTS,
)
"""Needs many more samples than units. Takes 8 bytes of memory times the number of units squared."""


def layer_statistics(tau: float = 0.025) -> list[Statistic[LayerCounts]]:
    """The numbers of a layer's outputs, in the order in which the picture of all layers shows them.

    Args:
        tau: A unit is dormant up to this share of the layer's mean magnitude.
    """
    return [
        Statistic(
            "nonfinite",
            _OfValues(nonfinite),
            "Share of NaN and infinities among all outputs of the sampled step, or of the whole evaluation, on all "
            "ranks.",
            "0, except for infinities that a mask puts out on purpose. The text `health/first_nonfinite_layer` names "
            "the module that made the first one in training. Try a lower learning rate, a warm-up, or gradient "
            "clipping.",
            look=Look("NaN or inf", ticks={}, word="NaN/inf", word_above=0.0),
        ),
        Statistic(
            "dead",
            _share_of_dead,
            f"Share of the dead units: they put out exactly zero. A unit is one channel or one feature. {_OF_SILENCE}",
            "0. A dead unit learns nothing more. Try a lower learning rate, a normalisation in front of the "
            "activation, or `leaky_relu`.",
            look=Look("dead units", word="dead units"),
            alarm=Alarm(
                "of the units are dead: they put out exactly zero, and for so many samples that it is no chance",
                "a lower learning rate, a normalisation in front of the activation, He initialisation, or an "
                "activation with a slope on both sides (leaky_relu, elu, gelu)",
                of_window=False,
            ),
        ),
        Statistic(
            "dormant",
            _WithDead(partial(dormant, tau=tau)),
            f"Share of the units whose mean magnitude is at most {tau:g} times the mean over the layer's units (Sokar "
            f"et al., 2023). Dead units are dormant, too. {_OF_WINDOW}",
            "Near 0. Dormant units hardly matter to the output. Try a lower learning rate or a normalisation in front "
            "of the activation.",
            look=Look("dormant units", healthy=(0.0, 0.05), ticks={0.05: "0.05", 0.5: "0.5", 1.0: "1"}),
            alarm=Alarm(
                "of the units are dormant: over the last {samples} samples their mean magnitude is at most tau times "
                "the layer's",
                "a lower learning rate, a normalisation in front of the activation, or setting these units' weights "
                "anew",
            ),
        ),
        Statistic(
            "saturated",
            _WhereBounded(_OfValues(saturated)),
            "Share of the outputs where the activation is flat: tanh beyond 0.99 in magnitude, sigmoid below 0.01 or "
            f"above 0.99, others at their bounds. {_OF_STEP}",
            "Below about 0.5. Hardly any gradient passes a saturated output. Try smaller initial weights or a "
            "normalisation in front of the activation.",
            look=Look("saturated", healthy=(0.0, 0.5), word="saturated"),
            alarm=Alarm(
                "of the outputs are saturated: the activation is flat there and passes hardly any gradient",
                "smaller initial weights, a normalisation in front of the activation, a lower learning rate, or an "
                "activation without bounds",
                of_window=False,
            ),
        ),
        Statistic(
            "zero",
            _OfValues(zero),
            f"Share of single outputs that are zero. {_OF_STEP} `layer_dead` counts units that are zero for every "
            "sample.",
            "About one half for a ReLU, 0 for most others.",
            look=Look("zeros", healthy=(0.0, 0.8), ticks={0.0: "0", 0.8: "0.8", 1.0: "1"}, word="zeros"),
        ),
        Statistic(
            "std",
            _OfValues(std),
            f"Population standard deviation of the outputs. {_OF_STEP}",
            "Near 1, and alike in all layers. Where it grows or shrinks from layer to layer, try another "
            "initialisation or a normalisation.",
            look=Look(
                "std",
                "two_sided",
                1e-4,
                1e4,
                {1e-4: "1e-4", 1.0: "1", 1e4: "1e4"},
                log=True,
                healthy=(0.03, 30.0),
            ),
        ),
        Statistic(
            "mean",
            _OfValues(mean),
            f"Mean of the outputs. {_OF_STEP}",
            "Small beside `layer_std`. Behind a ReLU, which has no negative values, it is of the same size.",
        ),
        Statistic(
            "min",
            _OfValues(minimum),
            f"Smallest output. {_OF_STEP}",
            "A few `layer_std` below `layer_mean`, 0 for a ReLU. A much lower one is an outlier.",
        ),
        Statistic(
            "max",
            _OfValues(maximum),
            f"Largest output. {_OF_STEP}",
            "A few `layer_std` above `layer_mean`. A much higher one is an outlier.",
        ),
        Statistic(
            "saturated_low",
            _WhereBounded(_OfValues(saturated_low)),
            f"Share of the outputs that are saturated at the lower end of the activation. {_OF_STEP}",
            "About as much as `layer_saturated_high`. A large difference means that the inputs are not centred.",
        ),
        Statistic(
            "saturated_high",
            _WhereBounded(_OfValues(saturated_high)),
            f"Share of the outputs that are saturated at the upper end of the activation. {_OF_STEP}",
            "About as much as `layer_saturated_low`. A large difference means that the inputs are not centred.",
        ),
        Statistic(
            "rarely_active",
            _WithDead(rarely_active),
            "Share of the units that are non-zero for less than 1 % of the samples and positions (Dohare et al., "
            f"2024). Dead units are among them. {_OF_WINDOW}",
            "Near 0. The cures are those of `layer_dead`.",
        ),
        Statistic(
            "saturated_units",
            _WhereBounded(_ShareOfUnits(always_saturated)),
            f"Share of the units that are saturated for at least 95 % of the samples and positions. {_OF_WINDOW}",
            "0. Such a unit passes hardly any gradient. Try smaller initial weights or a normalisation in front of the "
            "activation.",
        ),
    ]


def layer_catalogue(statistics: Sequence[Statistic[LayerCounts]] | None = None) -> Catalogue[LayerCounts, Entry]:
    """The numbers of layers' outputs and of the whole network, with their descriptions.

    Args:
        statistics: The numbers of a layer's outputs. ``None``: those of :func:`layer_statistics`.
    """
    return Catalogue(
        "layer",
        layer_statistics() if statistics is None else statistics,
        _HEALTH,
        {
            "hist": "Histogram of the outputs. Far outliers are counted in the outermost bin. "
            f"{_OF_STEP} Healthy: neither shrinking to one value nor widening from step to step. Peaks at the ends of "
            "a bounded activation mean saturation."
        },
    )


def gradient_catalogue() -> Catalogue[LayerCounts, Entry]:
    """The numbers of the gradients of layers' outputs: those statistics of outputs that make sense for any values."""
    return Catalogue(
        "layer",
        [
            replace(
                statistic,
                name=f"grad_{statistic.name}",
                description=f"{_GRADIENTS[statistic.name][0]} {_OF_GRADIENT}",
                healthy=_GRADIENTS[statistic.name][1],
                look=None,
            )
            for statistic in layer_statistics()
            if statistic.name in _GRADIENTS
        ],
        histograms={
            "grad_hist": "Histogram of the gradient values. Far outliers are counted in the outermost bin. "
            f"{_OF_GRADIENT} Healthy: {_ALIKE}"
        },
    )


_OF_GRADIENT = (
    "The gradient is that of the mean loss with respect to the layer's outputs, at the sampled step, over all "
    "micro-batches and ranks."
)
_ALIKE = (
    "Within a few orders of magnitude in all layers. Far smaller in the first layers than in the last: gradients "
    "vanish. Far larger: they explode. Try a normalisation or another initialisation."
)
# For each statistic of gradients what it is, and what is healthy.
_GRADIENTS = {
    "mean": ("Mean of the finite gradient values.", "Small beside `layer_grad_std`."),
    "std": ("Population standard deviation of the finite gradient values.", _ALIKE),
    "min": ("Smallest finite gradient value.", "A few `layer_grad_std` below `layer_grad_mean`."),
    "max": ("Largest finite gradient value.", "A few `layer_grad_std` above `layer_grad_mean`."),
    "zero": (
        "Share of zeros among the finite gradient values.",
        "Below 1. At 1 nothing reaches the layer: what follows it is dead, saturated or detached.",
    ),
    "nonfinite": (
        "Share of NaN and infinities among all gradient values.",
        "0. Try a lower learning rate or gradient clipping. With fp16, a few in the first steps are usual.",
    ),
}


def _share_of_finite(layer: LayerSums, count: Callable[[UnitSums], NDArray[np.float64]]) -> float | None:
    return float(count(layer.units).sum()) / layer.finite if layer.finite and layer.units is not None else None


_HEALTH = (
    Summary[Entry](
        "dead",
        _OverUnits("dead"),
        f"Share of dead units among all units of all activations. {_OF_SILENCE}",
        "0. `layer_dead` shows which layers it is, and what helps.",
    ),
    Summary[Entry](
        "dead_max",
        _worst_dead,
        f"Share of dead units in the activation that has the largest share. {_OF_SILENCE}",
        "0. `layer_dead` shows which layer it is, and what helps.",
    ),
    Summary[Entry](
        "dormant",
        _OverUnits("dormant"),
        "Share of dormant units among all units of all activations. A dormant unit's mean magnitude is at most `tau` "
        f"times the mean over its layer. {_OF_WINDOW}",
        "Near 0. `layer_dormant` shows which layers it is, and what helps.",
    ),
    Summary[Entry](
        "saturated",
        _OverLayers("saturated"),
        f"Share of saturated outputs in each bounded activation, averaged over these. {_OF_STEP}",
        "Below about 0.5. `layer_saturated` shows which layers it is, and what helps.",
    ),
    Summary[Entry](
        "nonfinite",
        _OverLayers("nonfinite"),
        "Share of NaN and infinities in each activation, averaged over the activations. Over all outputs of the "
        "sampled step, or of the whole evaluation, on all ranks.",
        "0. `layer_nonfinite` shows which layers it is, and what helps.",
    ),
)
