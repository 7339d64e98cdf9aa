"""The history of a run's samples, in bounded memory, for pictures of the whole run."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlightning._check import check_integer
from bnlightning.monitors.counting.histogram import MAGNITUDES, NUM_BINS
from bnlightning.monitors.record import Record
from bnlightning.monitors.statistic import Look

_BINS_AN_OCTAVE = 8
_FINITE = len(MAGNITUDES) - 1
_LARGEST = float(np.finfo(np.float32).max)
# Where the bins of either sign begin, counted in the fine bins of `count_values`. They are counted from the octave
# below whose end 99 % of a sample's magnitudes are. A picture has a linear axis. The octaves that fill it have eight
# bins each. Below them, bins are about as wide as the finest of those. Above them are only outliers, and bins are whole
# octaves.
_STARTS = np.array([-_FINITE, -40, -32, -28, *range(-24, -16, 2), *range(-16, 16), *range(16, 64, 8), 64])
_OUTLIERS = 0.01
_MAX_PENDING = 4
_PER_SIGN = len(_STARTS)
_SHARES = 2 * _PER_SIGN + 2


@dataclass(frozen=True)
class Distribution:
    """The distribution of a layer's values at one step, as shares of all values. A bin with a value is never zero.

    Args:
        anchor: Index in ``MAGNITUDES`` of the octave that the bins are laid around.
        shares: float16 of shape ``(96,)``: negative values by ascending magnitude, positive values likewise, zeros with
            the smallest denormals, and last NaN with infinities.
    """

    anchor: int
    shares: NDArray[np.float16]

    @property
    def zeros(self) -> float:
        """The share of zeros."""
        return float(self.shares[-2])

    @property
    def nonfinite(self) -> float:
        """The share of NaN and infinities."""
        return float(self.shares[-1])


def nonzero_shares(distributions: Sequence[Distribution]) -> NDArray[np.float64]:
    """The shares of the bins of all values except zeros, NaN and infinities, by ascending value.

    Returns:
        float64 of shape ``(distributions, bins)``.
    """
    shares = np.array([each.shares for each in distributions], dtype=np.float64).reshape(-1, _SHARES)
    return np.concatenate([shares[:, _PER_SIGN - 1 :: -1], shares[:, _PER_SIGN:-2]], axis=1)


def nonzero_edges(distributions: Sequence[Distribution]) -> NDArray[np.float64]:
    """The edges of the bins of :func:`nonzero_shares`. The two bins in the middle meet at zero.

    Returns:
        float64 of shape ``(distributions, bins + 1)``.
    """
    starts = _starts(np.array([each.anchor for each in distributions], dtype=np.int64).reshape(-1, 1))
    magnitudes = np.pad(MAGNITUDES[starts[:, 1:]], ((0, 0), (1, 1)))
    magnitudes[:, -1] = MAGNITUDES[-1]
    return np.concatenate([-magnitudes[:, :0:-1], magnitudes], axis=1)


def coarsen(bins: NDArray[np.int64]) -> list[Distribution]:
    """Make distributions of sums of what :func:`~bnlightning.monitors.counting.histogram.count_values` returned.

    Args:
        bins: Counts, int64 of shape ``(layers, NUM_BINS)``. Every row has a value.
    """
    signed = bins.reshape(len(bins), 2, NUM_BINS // 2)
    cumulative = np.zeros((len(bins), 2, NUM_BINS // 2 + 1), dtype=np.int64)
    np.cumsum(signed, axis=2, out=cumulative[:, :, 1:])
    magnitudes = cumulative[:, 0, 1 : _FINITE + 1] + cumulative[:, 1, 1 : _FINITE + 1]
    # Zeros are left out, since they have a share of their own.
    inner = _OUTLIERS * magnitudes[:, :1] + (1 - _OUTLIERS) * magnitudes[:, -1:]
    anchors = (magnitudes < inner).sum(axis=1) // _BINS_AN_OCTAVE * _BINS_AN_OCTAVE
    ends = np.full((len(bins), 1), _FINITE)
    edges = np.concatenate([_starts(anchors[:, None]), ends], axis=1)[:, None, :]
    finite = np.diff(np.take_along_axis(cumulative, edges, axis=2), axis=2)
    apart = np.stack([signed[:, :, 0].sum(axis=1), signed[:, :, _FINITE:].sum(axis=(1, 2))], axis=1)
    counts = np.concatenate([finite.reshape(len(bins), -1), apart], axis=1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    # A single NaN among a billion values must still be seen.
    shares = np.maximum(shares, np.finfo(np.float16).smallest_subnormal, where=counts > 0, out=shares)
    return [Distribution(int(anchor), row) for anchor, row in zip(anchors, shares.astype(np.float16), strict=True)]


def _starts(anchor: Any) -> NDArray[np.int64]:
    starts: NDArray[np.int64] = np.clip(anchor + _STARTS, 1, _FINITE)
    return starts


@dataclass(frozen=True)
class _Sample:
    """One step: distributions by layer, and values by statistic and number of the layer."""

    index: int
    step: int
    distributions: dict[str, Distribution]
    statistics: dict[str, NDArray[np.float32]]


class History:
    """Samples of a run, evenly spaced. Once there are too many, every second one is dropped.

    The newest sample is always there. A layer may appear late, or be missing at some steps. Sizes at the defaults:

    | part | in memory | in a checkpoint |
    |---|---|---|
    | all distributions | up to 3 MB | up to 0.4 MB |
    | a layer's values of one statistic | 0.6 kB | 0.5 kB |

    Args:
        max_steps: Largest number of samples.
        max_layers: Largest number of layers whose distributions are kept, evenly chosen among all in forward order.

    Example:
        >>> history = History(max_steps=4)
        >>> for step in range(0, 60, 10):
        ...     history.add(step, {}, {"dead": {"net.act1": 0.25}})
        >>> history.steps.tolist()
        [0, 20, 40, 50]
    """

    def __init__(self, max_steps: int = 128, max_layers: int = 16) -> None:
        check_integer("max_steps", max_steps, at_least=2)
        check_integer("max_layers", max_layers, at_least=1)
        self.max_steps = max_steps
        self.max_layers = max_layers
        self._clear()

    def _clear(self) -> None:
        self._samples: list[_Sample] = []
        # What is not coarsened yet of the last samples: the sample, its layers, their bins.
        self._pending: list[tuple[_Sample, list[str], NDArray[np.int64]]] = []
        self._stride = 1
        # In forward order. Their numbers follow the order of appearance, so the arrays of old samples need no change.
        self._layers: list[str] = []
        self._numbers: dict[str, int] = {}
        self._chosen: list[str] = []
        self._modules: dict[str, str] = {}

    @property
    def layers(self) -> list[str]:
        """All layers seen, in forward order. A layer that appeared late stands behind the one it followed."""
        return list(self._layers)

    @property
    def chosen_layers(self) -> list[str]:
        """The layers whose distributions are kept, in forward order."""
        return list(self._chosen)

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps of the samples kept, ascending."""
        return np.array([sample.step for sample in self._samples], dtype=np.int64)

    @property
    def statistics(self) -> list[str]:
        """The statistics that any sample has a value of."""
        names = dict.fromkeys(name for sample in self._samples for name in sample.statistics)
        return [name for name in names if not np.isnan(self.values(name)).all()]

    def module_of(self, layer: str) -> str:
        """The class of a layer's module. Empty if it is not known."""
        return self._modules.get(layer, "")

    def distributions(self, layer: str) -> list[Distribution | None]:
        """The distribution of a layer in each sample. ``None`` for a sample without one."""
        self._coarsen_pending()
        return [sample.distributions.get(layer) for sample in self._samples]

    def values(self, statistic: str) -> NDArray[np.float32]:
        """The values of a statistic, shape ``(layers, samples)``, layers in forward order. NaN if there is no value."""
        table = np.full((len(self._layers), len(self._samples)), np.nan, dtype=np.float32)
        for column, sample in enumerate(self._samples):
            values = sample.statistics.get(statistic, np.empty(0, dtype=np.float32))
            table[: len(values), column] = values
        return table[[self._numbers[layer] for layer in self._layers]]

    def add(
        self,
        step: int,
        bins: Mapping[str, NDArray[np.int64]],
        statistics: Mapping[str, Mapping[str, float | None]],
    ) -> None:
        """Add a sample.

        Args:
            step: Step of the sample, its place on the x-axis. Samples at this step and later are forgotten, since the
                run has gone back.
            bins: Sums of what ``count_values`` returned, int64 of shape ``(NUM_BINS,)``, by layer in forward order.
            statistics: Values by name of the statistic and by layer. ``None`` is no value.
        """
        self._go_back_to(step)
        new = [layer for layers in (bins, *statistics.values()) for layer in self._enrol(layers)]
        if new:
            self._choose({*self._chosen, *(layer for layer in new if layer in bins)})
        seen = [layer for layer in self._chosen if layer in bins and bins[layer].any()]
        rows = {name: self._row(values) for name, values in statistics.items()}
        index = self._samples[-1].index + 1 if self._samples else 0
        if self._samples and self._samples[-1].index % self._stride:
            # It was kept only because it was the newest.
            self._samples.pop()
        self._samples.append(_Sample(index, step, {}, rows))
        if seen:
            self._pending.append((self._samples[-1], seen, np.stack([bins[layer] for layer in seen])))
        # Coarsening several at once takes hardly longer than one.
        if len(self._pending) >= _MAX_PENDING:
            self._coarsen_pending()
        self._thin()

    def add_record(self, record: Record, looks: Mapping[str, Look], kind: str = "layer") -> None:
        """Add a training record: distributions and statistics of layers, or statistics of parameters or batch norms.

        Of layers, the statistics are those of activations if there are any. Of parameters, they are those of weights:
        a bias in front of a batch norm has no gradient, and that is healthy.

        Args:
            record: The record of a sampled training step.
            looks: The statistics to keep, by name, with what stands for one that a layer lacks.
            kind: ``"layer"``, ``"param"`` or ``"norm"``, as in tags.
        """
        entries = record.entries(kind)
        bins = {path: entry.bins for path, entry in entries.items() if entry.bins is not None}
        known = list(bins if kind == "layer" else entries)
        shown = [path for path in known if entries[path].is_activation or entries[path].is_weight] or known
        numbers = {
            name: {path: entries[path].numbers.get(name, look.absent) for path in shown} for name, look in looks.items()
        }
        self.add(record.step, bins, numbers)
        self._modules |= {path: entries[path].module for path in known}

    def state_dict(self) -> dict[str, Any]:
        """The history as lists, numbers and CPU tensors, which ``torch.load`` accepts as safe."""
        self._coarsen_pending()
        found = [[sample.distributions.get(layer) for sample in self._samples] for layer in self._chosen]
        anchors = np.full((len(self._chosen), len(self._samples)), -1, dtype=np.int16)
        shares = np.zeros((*anchors.shape, _SHARES), dtype=np.float16)
        for row, distributions in enumerate(found):
            for column, distribution in enumerate(distributions):
                if distribution is not None:
                    anchors[row, column], shares[row, column] = distribution.anchor, distribution.shares
        return {
            "stride": self._stride,
            "layers": self.layers,
            "chosen_layers": self.chosen_layers,
            "modules": dict(self._modules),
            "indices": [sample.index for sample in self._samples],
            "steps": [sample.step for sample in self._samples],
            "statistics": {name: torch.from_numpy(self.values(name)) for name in self.statistics},
            "anchors": torch.from_numpy(anchors),
            "shares": torch.from_numpy(shares),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, thinned if this history keeps fewer samples."""
        self._stride = state["stride"]
        self._layers = list(state["layers"])
        self._numbers = {layer: number for number, layer in enumerate(self._layers)}
        self._chosen = list(state["chosen_layers"])
        self._modules = dict(state["modules"])
        anchors, shares = state["anchors"].numpy(), state["shares"].numpy()
        tables = {name: table.numpy() for name, table in state["statistics"].items()}
        self._samples, self._pending = [], []
        for column, (index, step) in enumerate(zip(state["indices"], state["steps"], strict=True)):
            # Copies: a view would keep the table of all samples alive.
            distributions = {
                layer: Distribution(int(anchors[row, column]), shares[row, column].copy())
                for row, layer in enumerate(self._chosen)
                if anchors[row, column] >= 0
            }
            rows = {name: table[:, column].copy() for name, table in tables.items()}
            self._samples.append(_Sample(index, step, distributions, rows))
        self._choose(set(self._chosen))
        self._thin()

    def _coarsen_pending(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        distributions = iter(coarsen(np.concatenate([bins for _, _, bins in pending])))
        for sample, layers, _ in pending:
            found = {layer: next(distributions) for layer in layers}
            sample.distributions.update({layer: one for layer, one in found.items() if layer in self._chosen})

    def _go_back_to(self, step: int) -> None:
        self._samples = [sample for sample in self._samples if sample.step < step]
        if not self._samples:
            self._clear()

    def _enrol(self, layers: Mapping[str, Any]) -> list[str]:
        """Number the new layers, put each behind the one it followed, and return them."""
        behind: dict[str | None, list[str]] = {}
        known = None
        for layer in layers:
            if layer in self._numbers:
                known = layer
            else:
                behind.setdefault(known, []).append(layer)
        new = [layer for group in behind.values() for layer in group]
        self._numbers |= {layer: len(self._numbers) + index for index, layer in enumerate(new)}
        if new:
            # One pass for all. Searching the place of each would take a pass for every layer.
            followed = [[layer, *behind.get(layer, ())] for layer in self._layers]
            self._layers = [*behind.get(None, ()), *(layer for group in followed for layer in group)]
        return new

    def _choose(self, candidates: Set[str]) -> None:
        """Choose the layers whose distributions are kept.

        Args:
            candidates: The layers chosen before, and new ones. Only these have all their distributions.
        """
        before = self._chosen
        self._chosen = evenly([layer for layer in self._layers if layer in candidates], self.max_layers)
        for layer in set(before) - set(self._chosen):
            for sample in self._samples:
                sample.distributions.pop(layer, None)

    def _row(self, values: Mapping[str, float | None]) -> NDArray[np.float32]:
        row = np.full(len(self._numbers), np.nan, dtype=np.float32)
        for layer, value in values.items():
            if value is not None:
                # A picture need not tell numbers apart that float32 cannot hold.
                row[self._numbers[layer]] = np.clip(value, -_LARGEST, _LARGEST) if np.isfinite(value) else value
        return row

    def _thin(self) -> None:
        while len(self._samples) > self.max_steps:
            self._stride *= 2
            *older, newest = self._samples
            self._samples = [*(sample for sample in older if sample.index % self._stride == 0), newest]


def evenly(items: Sequence[str], number: int) -> list[str]:
    """At most ``number`` items, evenly spaced, with the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), number)).round().astype(int)
    return [items[index] for index in chosen]
