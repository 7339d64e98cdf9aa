"""Which units are dead, told from how often each of them fires.

A unit *fires* for a sample if it puts out anything but exactly zero at any position of that sample. A unit is dead if
it fires for no sample of the training set. A monitor sees only a part of the samples. So it calls a unit dead when it
has been silent for so many samples in a row that the chance of it is below 1 % for a unit that is alive.

**A unit that has fired.** It fired for ``k`` of ``m`` samples, and has been silent for the ``z`` samples since. If it
fires as ever, then all orders of these ``m + z`` samples are equally likely. The last ``z`` of them hold none of the
``k`` with the probability::

    p = (m choose k) / (m + z choose k) = (1 - k / (m + 1)) (1 - k / (m + 2)) ... (1 - k / (m + z))

This holds for any share of samples for which the unit fires. With many samples it is ``(1 - k/m)^z``. With few it is
larger, since ``k/m`` is then hardly known.

**A unit that has never fired** is taken as one that fires for 1 % of the samples. It is dead after 459 samples, the
smallest ``z`` with ``0.99^z`` below 1 %. Until then it counts as alive. Where no unit of a layer has ever fired, the
silent samples of all units are added up. Twice as many are asked for then, since units may fire for the same samples.

**A unit that has fired for very few samples.** Its rate is hardly known, so ``p`` asks for very many silent samples.
In a layer that has seen enough, such a unit is dead after 459, too, if ``(1 - k/m)^z`` is below half of 1 %.

A unit that fires for 1 % of the samples can be called dead in all of these ways. The chance of the second is taken off
that of the first, so that at most 1 % of such units are called dead at any time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlightning.monitors.counting.layers import LayerKey, UnitSums

CHANCE = 0.01
"""Largest probability with which a unit that is alive is called dead."""
RAREST = 0.01
"""Share of the samples for which a unit fires of which nothing is known."""
SAMPLES_OF_SILENCE = math.ceil(math.log(CHANCE) / math.log1p(-RAREST))
"""A unit that has never fired is dead after so many samples."""

# Half of what is known of a unit is forgotten while it fires so often.
_FIRES = 70.0
# Halved once, a single fire is a matter of the past.
_FORGOTTEN = 1 / 2


@dataclass(frozen=True)
class _Units:
    """What is known of the units of a layer, float64 of shape ``(units,)``.

    Args:
        fires: Number of samples for which the unit fired. Older ones weigh less.
        samples: Number of samples up to the last one for which it fired, weighted likewise.
        silent: Number of samples since then.
        total: Number of samples of the layer so far, a scalar.
    """

    fires: NDArray[np.float64]
    samples: NDArray[np.float64]
    silent: NDArray[np.float64]
    total: NDArray[np.float64]

    def chances(self) -> NDArray[np.float64]:
        """With what probability a unit that is alive would be silent for as long as each unit is, ``(units,)``."""
        never = self.fires < _FORGOTTEN
        chances: NDArray[np.float64] = np.where(never, (1 - RAREST) ** self.silent, 1.0)
        stopped = np.flatnonzero(~never & (self.silent > 0))
        if len(stopped):
            chances[stopped] = _chances(self.fires[stopped], self.samples[stopped], self.silent[stopped])
        return chances

    def dead(self) -> NDArray[np.bool_]:
        """Which units are dead, bool of shape ``(units,)``."""
        never = self.fires < _FORGOTTEN
        if never.all() and self.silent.min() * len(never) >= 2 * SAMPLES_OF_SILENCE:
            return never
        allowed = np.where(never, CHANCE, self._allowed_after_fires())
        dead: NDArray[np.bool_] = self.chances() <= allowed
        return dead | (~never & self._silent_for_long())

    def _allowed_after_fires(self) -> float:
        """:data:`CHANCE`, less the chance that a unit of share :data:`RAREST` has never fired in so many samples."""
        late = float(self.total) - SAMPLES_OF_SILENCE
        # Halving the exponent keeps the sum of both chances below CHANCE by more than its sampling error.
        return CHANCE if late < 0 else CHANCE * (1 - (1 - RAREST) ** (late / 2))

    def _silent_for_long(self) -> NDArray[np.bool_]:
        is_long = (self.total >= 3 * SAMPLES_OF_SILENCE) & (self.silent >= SAMPLES_OF_SILENCE)
        # (1 - f)^silent is below half of CHANCE, for f = fires / samples. The other half is for chances above.
        found: NDArray[np.bool_] = is_long & (self.silent * self.fires >= -math.log(CHANCE / 2) * self.samples)
        return found


class Firing:
    """Which units of each layer are dead, from one sampled step to the next.

    It takes 24 bytes for each unit.

    Args:
        samples: Largest number of samples in which half of what is known is forgotten. Of a unit that fires often it is
            less, so that a share that changes in training is followed.

    Example:
        A unit that fires for half of the samples is dead after 8 silent ones in a row.

        >>> from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey
        >>> firing, key = Firing(), LayerKey("net.act", is_activation=True, units=1)
        >>> for outputs in (torch.arange(100) % 2, torch.zeros(4), torch.zeros(4)):
        ...     accumulators = LayerAccumulators()
        ...     accumulators.update(key, outputs.view(-1, 1).float())
        ...     print(firing.update(key, accumulators.reduce(torch.device("cpu"))[key].units))
        [False]
        [False]
        [ True]
    """

    def __init__(self, samples: int = 1000) -> None:
        self.samples = samples
        self._layers: dict[LayerKey, _Units] = {}

    def update(self, key: LayerKey, units: UnitSums) -> NDArray[np.bool_]:
        """Add a sampled step of training, and return which units are dead with it.

        Args:
            key: The layer.
            units: The sums of its units over the sampled step and all ranks.

        Returns:
            bool of shape ``(units,)``.
        """
        known = self._layers[key] = self._with_step(self._before(key), units)
        return known.dead()

    def of_evaluation(self, key: LayerKey, units: UnitSums) -> NDArray[np.bool_]:
        """Which units are dead in an evaluation: by its samples, and by what is known from training.

        A unit that is silent for an evaluation of 459 samples or more is dead in it, whatever is known.

        Args:
            key: The layer.
            units: The sums of its units over the evaluation and all ranks.

        Returns:
            bool of shape ``(units,)``.
        """
        known, is_silent = self._before(key), units.fired == 0
        if units.samples < SAMPLES_OF_SILENCE:
            with_it = replace(known, silent=known.silent + units.samples, total=known.total + units.samples)
            is_silent = is_silent & with_it.dead()
        found: NDArray[np.bool_] = is_silent
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._layers.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """What is known of the units as plain values and tensors, for a checkpoint."""
        return [
            {"key": vars(key).copy(), "units": [torch.from_numpy(each) for each in vars(units).values()]}
            for key, units in self._layers.items()
        ]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._layers = {LayerKey(**layer["key"]): _Units(*(each.numpy() for each in layer["units"])) for layer in state}

    def _before(self, key: LayerKey) -> _Units:
        known = self._layers.get(key)
        nothing = np.zeros(key.units)
        return _Units(nothing, nothing, nothing, np.zeros(())) if known is None else known

    def _with_step(self, before: _Units, units: UnitSums) -> _Units:
        fires, silence = units.fired > 0, before.silent + units.samples
        # What a unit did before it died tells nothing of a unit that has come back. Silence by chance is no death.
        goes_on = ~fires | (before.chances() > CHANCE**2)
        seen = np.where(goes_on, silence, units.samples)
        kept = goes_on * np.where(
            fires, 0.5 ** (silence / self._half_life(before)), self._kept_in_silence(before, units)
        )
        return _Units(
            fires=kept * before.fires + units.fired,
            samples=kept * before.samples + np.where(fires, seen, 0.0),
            silent=np.where(fires, 0.0, silence),
            total=np.asarray(before.total + units.samples),
        )

    def _half_life(self, units: _Units) -> NDArray[np.float64]:
        """Number of samples in which half is forgotten."""
        samples_of_fires = _FIRES * units.samples / np.maximum(units.fires, _FORGOTTEN)
        life: NDArray[np.float64] = np.clip(samples_of_fires, 1.0, self.samples)
        return life

    def _kept_in_silence(self, units: _Units, added: UnitSums) -> NDArray[np.float64]:
        """The share that is kept while a unit is silent. A normal silence is shorter than a window."""
        kept: NDArray[np.float64] = np.where(units.silent > self.samples, 0.5 ** (added.samples / self.samples), 1.0)
        return kept


def _chances(
    fires: NDArray[np.float64], samples: NDArray[np.float64], silent: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The quotient of binomials at the top of this file, by its logarithm."""
    logarithm = (
        _log_factorial(samples)
        - _log_factorial(samples - fires)
        + _log_factorial(samples + silent - fires)
        - _log_factorial(samples + silent)
    )
    chances: NDArray[np.float64] = np.exp(logarithm)
    return chances


def _log_factorial(number: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = torch.lgamma(torch.from_numpy(number + 1)).numpy()
    return found
