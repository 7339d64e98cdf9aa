"""The window: the samples that the numbers of units are over."""

from typing import Any

import numpy as np
import torch

from bnlightning.monitors.counting.layers import LayerKey, UnitSums


class RecentUnits:
    """Sums of each layer's units over its last ``samples`` samples, or up to twice as many.

    Two generations of at least ``samples`` samples are kept. The older one is dropped when the younger one is complete.

    Args:
        samples: Least number of samples of a generation, of all ranks together.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._younger: dict[LayerKey, UnitSums] = {}
        self._older: dict[LayerKey, UnitSums] = {}

    def add(self, key: LayerKey, units: UnitSums) -> UnitSums:
        """Add the sums of one sampled step, and return the sums over the window with this step.

        Args:
            key: The layer.
            units: The sums of its units over the sampled step and all ranks.
        """
        younger = self._younger[key] + units if key in self._younger else units
        recent = younger + self._older[key] if key in self._older else younger
        if younger.samples >= self.samples:
            self._older[key] = younger
            self._younger.pop(key, None)
        else:
            self._younger[key] = younger
        return recent

    def clear(self) -> None:
        """Forget everything."""
        self._younger.clear()
        self._older.clear()

    def state_dict(self) -> dict[str, Any]:
        """Both generations as plain values and tensors, for a checkpoint."""
        return {name: [_packed(key, units) for key, units in getattr(self, name).items()] for name in _GENERATIONS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for name in _GENERATIONS:
            setattr(self, name, dict(_unpacked(packed) for packed in state[name]))


_GENERATIONS = ("_younger", "_older")


def _packed(key: LayerKey, units: UnitSums) -> dict[str, Any]:
    sums = torch.from_numpy(np.stack([units.nonzero, units.magnitude, units.fired, units.low, units.high]))
    return {**vars(key), "observations": units.observations, "samples": units.samples, "sums": sums}


def _unpacked(packed: dict[str, Any]) -> tuple[LayerKey, UnitSums]:
    packed = dict(packed)
    sums, observations, samples = packed.pop("sums").numpy(), packed.pop("observations"), packed.pop("samples")
    return LayerKey(**packed), UnitSums(observations, samples, *sums)
