"""From sums over a window to the numbers that people look at: pure functions.

Fractions are in [0, 1]. A function gives ``None`` where its number does not exist: no finite value, no units.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlightning.monitors.counting.histogram import num_zero
from bnlightning.monitors.counting.layers import LayerKey, LayerSums, UnitSums

RARELY = 0.01
"""Dohare et al., "Loss of plasticity in deep continual learning" (Nature 2024): active for less than 1 % of samples."""
ALMOST_ALWAYS = 0.95
"""A unit is saturated if it is so in this share of the samples."""


def mean(layer: LayerSums) -> float | None:
    """Of the finite values."""
    return layer.sum / layer.finite if layer.finite else None


def std(layer: LayerSums) -> float | None:
    """Population standard deviation of the finite values."""
    if not layer.finite:
        return None
    return math.sqrt(max(layer.sum_squares / layer.finite - (layer.sum / layer.finite) ** 2, 0.0))


def minimum(layer: LayerSums) -> float | None:
    """Of the finite values."""
    return layer.minimum if layer.minimum <= layer.maximum else None


def maximum(layer: LayerSums) -> float | None:
    """Of the finite values."""
    return layer.maximum if layer.minimum <= layer.maximum else None


def zero(layer: LayerSums) -> float | None:
    """Share of zeros among the finite values; what is below 2^-129 in magnitude counts as zero."""
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

    With ``sigma`` its singular values (Roy & Vetterli, EUSIPCO 2007), not centred. From 1 to the number of units, and
    at most the number of observations.
    """
    if layer.second_moments is None:
        return None
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(layer.second_moments), 0.0, None))
    # What rounding makes of zeros would count as many small directions.
    shares = singular[singular > 1e-5 * singular.max(initial=0.0)]
    if not len(shares):
        return None
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dead(units: UnitSums) -> NDArray[np.bool_]:
    """Which units were exactly zero for every sample and position. One with a non-finite value is not dead."""
    return units.nonzero == 0


def dormant(units: UnitSums, tau: float) -> NDArray[np.bool_]:
    """Which units are tau-dormant (Sokar et al., ICML 2023): mean magnitude at most ``tau`` times the layer's.

    The magnitudes are means over samples and positions, the layer's the mean over its units. All units of a layer of
    zeros are dormant; one without a finite value is not.
    """
    broken = (units.magnitude == 0) & (units.nonzero > 0)
    return (units.magnitude <= tau * units.magnitude.mean()) & ~broken


def rarely_active(units: UnitSums) -> NDArray[np.bool_]:
    """Which units were not zero for less than :data:`RARELY` of the samples and positions."""
    return units.nonzero < RARELY * units.observations


def always_saturated(units: UnitSums) -> NDArray[np.bool_]:
    """Which units were beyond the activation's limits for at least :data:`ALMOST_ALWAYS` of samples and positions."""
    return units.low + units.high >= ALMOST_ALWAYS * units.observations


_OF_VALUES: dict[str, Callable[[LayerSums], float | None]] = {
    "mean": mean,
    "std": std,
    "min": minimum,
    "max": maximum,
    "zero": zero,
    "nonfinite": nonfinite,
    "saturated": saturated,
    "saturated_low": saturated_low,
    "saturated_high": saturated_high,
    "effective_rank": effective_rank,
}


def statistics(key: LayerKey, layer: LayerSums, recent: UnitSums | None, tau: float) -> dict[str, float]:
    """All numbers of a layer that exist, by the name in their tag.

    Args:
        key: Of the layer.
        layer: Sums over the sample.
        recent: Sums of the units over the window of samples in which they may fire; ``None`` without units.
        tau: Of :func:`dormant`.
    """
    bounded = key.limits is not None
    found = {name: of(layer) for name, of in _OF_VALUES.items() if bounded or not name.startswith("saturated")}
    if recent is not None:
        found |= {
            "dead": np.count_nonzero(dead(recent)) / len(recent.nonzero),
            "dormant": np.count_nonzero(dormant(recent, tau)) / len(recent.nonzero),
            "rarely_active": np.count_nonzero(rarely_active(recent)) / len(recent.nonzero),
        }
        if bounded:
            found["saturated_units"] = np.count_nonzero(always_saturated(recent)) / len(recent.nonzero)
    return {name: float(value) for name, value in found.items() if value is not None}


def health(layers: Iterable[tuple[dict[str, float], int]]) -> dict[str, float]:
    """The activations of a network in few numbers.

    Args:
        layers: The statistics of each activation, and how many units it has.

    Returns:
        ``dead``, ``dormant``: share of all units. ``dead_max``: of the worst layer. ``nonfinite``,
        ``saturated``: mean over the layers that have it.
    """
    layers = list(layers)
    found: dict[str, float] = {}
    with_units = [(values, units) for values, units in layers if units]
    if with_units:
        number = sum(units for _, units in with_units)
        for name in ("dead", "dormant"):
            found[name] = sum(values[name] * units for values, units in with_units) / number
        found["dead_max"] = max(values["dead"] for values, _ in with_units)
    for name in ("nonfinite", "saturated"):
        shares = [values[name] for values, _ in layers if name in values]
        if shares:
            found[name] = sum(shares) / len(shares)
    return found


def _share_of_finite(layer: LayerSums, count: Callable[[UnitSums], NDArray[np.float64]]) -> float | None:
    return float(count(layer.units).sum()) / layer.finite if layer.finite and layer.units is not None else None


class RecentUnits:
    """The units of each layer over the last ``samples`` to twice as many samples that it saw.

    Whether a unit is dead takes many samples. Sums of two generations of at least ``samples`` each are kept; the older
    is dropped when the younger is complete.

    Args:
        samples: Over all ranks.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._younger: dict[LayerKey, UnitSums] = {}
        self._older: dict[LayerKey, UnitSums] = {}

    def add(self, key: LayerKey, units: UnitSums) -> UnitSums:
        """Add those of a layer; what is known of its recent samples, these included."""
        younger = self._younger[key] + units if key in self._younger else units
        recent = younger + self._older[key] if key in self._older else younger
        if younger.samples >= self.samples:
            self._older[key] = younger
            self._younger.pop(key, None)
        else:
            self._younger[key] = younger
        return recent

    def state_dict(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        return {name: [_packed(key, units) for key, units in getattr(self, name).items()] for name in _GENERATIONS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name in _GENERATIONS:
            setattr(self, name, dict(_unpacked(packed) for packed in state[name]))


_GENERATIONS = ("_younger", "_older")


def _packed(key: LayerKey, units: UnitSums) -> dict[str, Any]:
    sums = torch.from_numpy(np.stack([units.nonzero, units.magnitude, units.low, units.high]))
    return {**vars(key), "observations": units.observations, "samples": units.samples, "sums": sums}


def _unpacked(packed: dict[str, Any]) -> tuple[LayerKey, UnitSums]:
    packed = dict(packed)
    sums, observations, samples = packed.pop("sums").numpy(), packed.pop("observations"), packed.pop("samples")
    return LayerKey(**packed), UnitSums(observations, samples, *sums)
