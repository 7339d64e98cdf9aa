"""The monitor of what the modules of a network put out: plain torch, for any training loop.

>>> from torch import nn
>>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
>>> monitor = Activations()
>>> monitor.attach(network)
>>> monitor.open(step=0)
>>> monitor.observe()
>>> _ = network(torch.ones(16, 4))
>>> record = monitor.close()
>>> record.layers["1"].samples
16
>>> monitor.detach()
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlightning.compare.names import TRAIN
from bnlightning.monitors.catching.finite_check import FiniteCheck, Found, make_check
from bnlightning.monitors.catching.observer import Observer
from bnlightning.monitors.catching.selection import Choice, device_of
from bnlightning.monitors.counting.firing import Firing
from bnlightning.monitors.counting.histogram import Histogram, TypicalRanges, finite_histogram, narrowed
from bnlightning.monitors.counting.layer_statistics import (
    LayerCounts,
    gradient_catalogue,
    layer_catalogue,
)
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey, LayerSums, UnitSums
from bnlightning.monitors.counting.ranks import first_of_ranks
from bnlightning.monitors.counting.units import RecentUnits
from bnlightning.monitors.record import Entry, Record
from bnlightning.monitors.statistic import Statistic
from bnlightning.monitors.words import Mishaps


class Activations:
    """Watch the outputs of a network's modules, and make a :class:`~bnlightning.monitors.record.Record` of each sample.

    Between :meth:`open` and :meth:`close` the outputs of every watched call are counted, whatever the number of batches
    and calls. An evaluation may be opened while training is open, for each phase has accumulators of its own.

    Args:
        modules: The modules to watch, as in :class:`~bnlightning.ActivationMonitor`.
        window_samples: Least number of samples, of all ranks together, that the numbers of units are over.
        max_layers: Largest number of watched layers.
        statistics: The numbers of each layer. ``None``: those of
            :func:`~bnlightning.monitors.counting.layer_statistics.layer_statistics`.
    """

    def __init__(
        self,
        modules: Sequence[Choice] | None = None,
        *,
        window_samples: int = 1000,
        max_layers: int = 200,
        statistics: Sequence[Statistic[LayerCounts]] | None = None,
    ) -> None:
        self._outputs = layer_catalogue(statistics)
        self._gradients = gradient_catalogue()
        self.catalogues = (self._outputs, self._gradients)
        self._sums = list(dict.fromkeys(one.sum for one in self._outputs.statistics if one.sum is not None))
        names = [each.name for each in self._sums]
        if len(set(names)) < len(names):
            raise ValueError(f"statistics with sums of one name are not possible: {names}. Give each sum its own name.")
        self._observer = Observer(modules, max_layers)
        self._recent = RecentUnits(window_samples)
        self._firing = Firing(window_samples)
        self._ranges = TypicalRanges()
        self.mishaps = Mishaps("ActivationMonitor")
        self._device = torch.device("cpu")
        self._check: FiniteCheck | None = None
        # The step of each phase that is open. Accumulators that are not open are kept to be used again.
        self._steps: dict[str, int] = {}
        self._accumulators: dict[str, LayerAccumulators] = {}

    @property
    def is_attached(self) -> bool:
        """Whether a network is watched."""
        return self._check is not None

    @property
    def observer(self) -> Observer:
        """The hooks, and what they saw."""
        return self._observer

    def attach(self, module: nn.Module, device: torch.device | None = None, *, checks: bool = False) -> None:
        """Put one hook on every watched module of ``module``.

        Args:
            module: The network.
            device: The device of its values. ``None``: that of its first parameter.
            checks: Whether :meth:`begin_check` will be used, which needs hooks on further modules.
        """
        self.detach()
        self._device = device_of(module) if device is None else device
        self._observer.attach(module, checks, self._device)
        self._check = make_check(self._device)
        self._check.hold(module)

    def detach(self) -> None:
        """Take all hooks away. The window and the ranges stay, for the network may be attached again."""
        self._observer.detach()
        self._check = None
        self._steps.clear()
        self._accumulators.clear()

    def forget(self) -> None:
        """Forget the window of samples, how often units fired and the typical ranges: a training begins anew."""
        self._recent.clear()
        self._firing.clear()
        self._ranges = TypicalRanges()

    def open(self, step: int, phase: str = TRAIN, *, grad_scale: float | None = None) -> None:
        """Open a sample: what is observed in ``phase`` from now on makes a record.

        Args:
            step: Step of the record, its place on the x-axis.
            phase: ``"train"``, ``"val"`` or ``"test"``.
            grad_scale: Factor for the gradients of outputs. ``None``: gradients are not watched.
        """
        accumulators = self._accumulators.setdefault(phase, LayerAccumulators(self._sums, self.mishaps))
        accumulators.reset()
        self._steps[phase] = step
        if phase == TRAIN:
            self._observer.grad_scale = grad_scale

    def is_open(self, phase: str = TRAIN) -> bool:
        """Whether a sample of ``phase`` is open."""
        return phase in self._steps

    def observe(self, phase: str = TRAIN) -> None:
        """Begin a batch of ``phase``. The next call of each module is its first."""
        self._observer.start(self._accumulators[phase] if phase in self._steps else None, phase == TRAIN)

    def start_pass(self) -> None:
        """Send the same batch through the network once more. The next call of each module is its first."""
        self._observer.start_pass()

    def tell_backward(self, is_of_loss: bool | None) -> None:
        """Say whether the loss goes backward from now on. Other backward passes then do not count.

        Args:
            is_of_loss: ``None``: nobody says. Then each ``backward()`` counts, and no ``torch.autograd.grad``.
        """
        self._observer.backwards.is_of_loss = is_of_loss

    def pause(self) -> None:
        """End a batch: nothing is observed until the next :meth:`observe`."""
        self._observer.stop()

    def close(self, phase: str = TRAIN) -> Record | None:
        """Close the sample of ``phase`` and reduce it over the ranks. Every rank must call this.

        Returns:
            The record, the same on all ranks. ``None`` if no sample was open.
        """
        if phase not in self._steps:
            return None
        self.pause()
        return self.record(self._steps.pop(phase), phase, self._accumulators[phase].reduce(self._device))

    def record(self, step: int, phase: str, reduced: Mapping[LayerKey, LayerSums]) -> Record:
        """Make the record of what was counted. In training the window of samples goes on by it.

        Args:
            step: Step of the record, its place on the x-axis.
            phase: ``"train"``, ``"val"`` or ``"test"``.
            reduced: The sums over all ranks, by layer.
        """
        entries: dict[str, Entry] = {}
        for key, sums in reduced.items():
            entry = self._entry(key, sums, phase)
            before = entries.get(key.label)
            entries[key.label] = entry if before is None else _merged(before, entry)
        health = self._outputs.health([entry for entry in entries.values() if entry.is_activation], self.mishaps)
        return Record(step, phase, layers=entries, health=health)

    def begin_check(self, step: int, batch: Any = None, batch_idx: int | None = None) -> None:
        """Begin a training step in which modules are checked for NaN and infinities.

        Args:
            step: Number of the step.
            batch: What the step is given. ``None``: it is not known, and cannot be the origin.
            batch_idx: Number of the batch.
        """
        if self._check is not None:
            self._check.begin(step, batch, batch_idx)
            self._observer.start_check(self._check)

    def expect_new_parameters(self) -> None:
        """Take note that an optimizer steps, for the check."""
        if self._observer.check is not None:
            self._observer.check.expect_new_parameters()

    def check_loss(self, loss: Tensor) -> None:
        """Check the loss, which comes behind all modules."""
        if self._observer.check is not None:
            self._observer.look_at_sums()
            self._observer.check.update_loss(loss.detach())

    def end_check(self) -> bool:
        """End the checked step.

        Returns:
            Whether :meth:`first_nonfinite` can tell at once, without waiting for the device.
        """
        check = self._observer.check
        if check is None:
            return False
        self._observer.look_at_sums()
        check.end()
        self._observer.stop_check()
        return check.is_immediate

    def first_nonfinite(self) -> Found | None:
        """Where the first NaN or infinity of all ranks came from. Every rank must call this."""
        return first_of_ranks(self._check.found() if self._check is not None else None, self._device)

    def state_dict(self) -> dict[str, Any]:
        """The window, how often units fired and the typical ranges as plain values and tensors, for a checkpoint."""
        return {
            "recent": self._recent.state_dict(),
            "firing": self._firing.state_dict(),
            "ranges": self._ranges.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._recent.load_state_dict(state["recent"])
        self._firing.load_state_dict(state["firing"])
        self._ranges.load_state_dict(state["ranges"])

    def _entry(self, key: LayerKey, sums: LayerSums, phase: str) -> Entry:
        units, dead = self._units(key, sums, phase)
        catalogue = self._gradients if key.is_gradient else self._outputs
        return Entry(
            numbers=catalogue.numbers(LayerCounts(key, sums, units, dead), self.mishaps),
            histograms=self._histograms(key, sums, phase),
            bins=None if key.is_gradient else narrowed(sums.bins),
            units=key.units,
            samples=units.samples if units is not None else 0,
            is_activation=key.is_activation,
            module=self._observer.module_of(key.label),
        )

    def _units(
        self, key: LayerKey, sums: LayerSums, phase: str
    ) -> tuple[UnitSums, NDArray[np.bool_]] | tuple[None, None]:
        """The sums of the units, and which are dead. Over the window in training, over all samples in an evaluation."""
        if sums.units is None:
            return None, None
        if phase != TRAIN:
            return sums.units, self._firing.of_evaluation(key, sums.units)
        return self._recent.add(key, sums.units), self._firing.update(key, sums.units)

    def _histograms(self, key: LayerKey, sums: LayerSums, phase: str) -> dict[str, Histogram]:
        if sums.minimum > sums.maximum:
            return {}
        histogram = finite_histogram(sums.bins, sums.minimum, sums.maximum, sums.sum, sums.sum_squares)
        name = "grad_hist" if key.is_gradient else "hist"
        return {name: self._ranges.fit(f"{phase}/{name}/{key.label}", histogram)}


def _merged(one: Entry, other: Entry) -> Entry:
    """One entry for a layer that was counted twice: its outputs, and the gradients of its outputs."""
    output, gradient = (one, other) if one.bins is not None else (other, one)
    return Entry(
        numbers={**output.numbers, **gradient.numbers},
        histograms={**output.histograms, **gradient.histograms},
        bins=output.bins,
        units=output.units,
        samples=output.samples,
        is_activation=output.is_activation,
        module=output.module,
    )
