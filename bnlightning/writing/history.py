"""What is kept of a run's samples, in bounded memory, for pictures of the whole run."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlightning._check import check_integer
from bnlightning.monitors.counting.histogram import MAGNITUDES, NUM_BINS
from bnlightning.monitors.record import Record

_BINS_AN_OCTAVE = 8
_FINITE = len(MAGNITUDES) - 1
# Where the bins of either sign begin, in the fine bins of `_histogram`, from the octave in which a sample's magnitudes
# end but for 1 %. A picture has a linear axis: eight bins in each of the octaves that fill it; below them about as wide
# as the finest of those; above them, where only outliers are, whole octaves.
_STARTS = np.array([-_FINITE, -40, -32, -28, *range(-24, -16, 2), *range(-16, 16), *range(16, 64, 8), 64])
_OUTLIERS = 0.01
_MAX_PENDING = 4
_PER_SIGN = len(_STARTS)
_SHARES = 2 * _PER_SIGN + 2


@dataclass(frozen=True)
class Distribution:
    """How a layer's values were distributed at one step, as shares of all of them; a nonempty bin is never zero.

    Args:
        anchor: Index in ``MAGNITUDES`` of the octave that the bins are laid around.
        shares: float16 of shape ``(96,)``: negative values by ascending magnitude, positive ones likewise, zeros
            (with the smallest denormals), NaN and infinities.
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
    """The shares of the bins of all values but zeros, NaN and infinities, by ascending value.

    Of shape ``(distributions, bins)``.
    """
    shares = np.array([each.shares for each in distributions], dtype=np.float64).reshape(-1, _SHARES)
    return np.concatenate([shares[:, _PER_SIGN - 1 :: -1], shares[:, _PER_SIGN:-2]], axis=1)


def nonzero_edges(distributions: Sequence[Distribution]) -> NDArray[np.float64]:
    """The edges of the bins of :func:`nonzero_shares`, one more. The two bins in the middle meet at zero."""
    starts = _starts(np.array([each.anchor for each in distributions], dtype=np.int64).reshape(-1, 1))
    magnitudes = np.pad(MAGNITUDES[starts[:, 1:]], ((0, 0), (1, 1)))
    magnitudes[:, -1] = MAGNITUDES[-1]
    return np.concatenate([-magnitudes[:, :0:-1], magnitudes], axis=1)


def coarsen(bins: NDArray[np.int64]) -> list[Distribution]:
    """Distributions of what :func:`~bnlightning.monitors.counting.histogram.count_values` gave, added up.

    Args:
        bins: Counts of shape ``(layers, NUM_BINS)``; no row without a value.
    """
    signed = bins.reshape(len(bins), 2, NUM_BINS // 2)
    cumulative = np.zeros((len(bins), 2, NUM_BINS // 2 + 1), dtype=np.int64)
    np.cumsum(signed, axis=2, out=cumulative[:, :, 1:])
    magnitudes = cumulative[:, 0, 1 : _FINITE + 1] + cumulative[:, 1, 1 : _FINITE + 1]
    # Without the zeros, which have a share of their own.
    inner = _OUTLIERS * magnitudes[:, :1] + (1 - _OUTLIERS) * magnitudes[:, -1:]
    anchors = (magnitudes < inner).sum(axis=1) // _BINS_AN_OCTAVE * _BINS_AN_OCTAVE
    ends = np.full((len(bins), 1), _FINITE)
    edges = np.concatenate([_starts(anchors[:, None]), ends], axis=1)[:, None, :]
    finite = np.diff(np.take_along_axis(cumulative, edges, axis=2), axis=2)
    apart = np.stack([signed[:, :, 0].sum(axis=1), signed[:, :, _FINITE:].sum(axis=(1, 2))], axis=1)
    counts = np.concatenate([finite.reshape(len(bins), -1), apart], axis=1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    # A single NaN among a billion values is still to be seen.
    shares = np.maximum(shares, np.finfo(np.float16).smallest_subnormal, where=counts > 0, out=shares)
    return [Distribution(int(anchor), row) for anchor, row in zip(anchors, shares.astype(np.float16), strict=True)]


def _starts(anchor: Any) -> NDArray[np.int64]:
    return np.clip(anchor + _STARTS, 1, _FINITE)


@dataclass(frozen=True)
class _Sample:
    """What is known of one step: distributions by layer, and of each statistic the values by number of the layer."""

    index: int
    step: int
    distributions: dict[str, Distribution]
    statistics: dict[str, NDArray[np.float32]]


class History:
    """Samples of a run, evenly spaced: once there are too many, every second one is dropped.

    The newest is always there. A layer may appear late or be missing at some steps. At the defaults it takes up to 3 MB
    for distributions, and 0.6 kB for each layer and statistic; in a checkpoint 0.4 MB and 0.5 kB.

    Args:
        max_steps: How many samples are kept.
        max_layers: Number of layers whose distributions are kept, evenly chosen among all in forward order.
    """

    def __init__(self, max_steps: int = 128, max_layers: int = 16) -> None:
        check_integer("max_steps", max_steps, at_least=2)
        check_integer("max_layers", max_layers, at_least=1)
        self.max_steps = max_steps
        self.max_layers = max_layers
        self._clear()

    def _clear(self) -> None:
        self._samples: list[_Sample] = []
        # Of the last samples, what is not coarsened yet: the sample, its layers, their bins.
        self._pending: list[tuple[_Sample, list[str], NDArray[np.int64]]] = []
        self._stride = 1
        # In forward order; and numbered as they appeared, so that the arrays of old samples stay as they are.
        self._layers: list[str] = []
        self._numbers: dict[str, int] = {}
        self._chosen: list[str] = []

    @property
    def layers(self) -> list[str]:
        """All layers seen, in forward order: of those that appeared late behind the one they followed."""
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
        """The statistics of which some sample has a value."""
        names = dict.fromkeys(name for sample in self._samples for name in sample.statistics)
        return [name for name in names if not np.isnan(self.values(name)).all()]

    def distributions(self, layer: str) -> list[Distribution | None]:
        """Of each sample, ``None`` where it has none of this layer."""
        self._coarsen_pending()
        return [sample.distributions.get(layer) for sample in self._samples]

    def values(self, statistic: str) -> NDArray[np.float32]:
        """Of shape ``(layers, samples)``, the layers in forward order; NaN where there is no value."""
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
            step: Where it stands on the x-axis. Samples from there on are forgotten: the run has gone back.
            bins: By layer, in forward order: what ``count_values`` gave, added up, of shape ``(NUM_BINS,)``.
            statistics: By name of the statistic and by layer. ``None`` is no value.
        """
        self._go_back_to(step)
        new = [layer for layers in (bins, *statistics.values()) for layer in self._enrol(layers)]
        if new:
            self._choose({*self._chosen, *(layer for layer in new if layer in bins)})
        seen = [layer for layer in self._chosen if layer in bins and bins[layer].any()]
        rows = {name: self._row(values) for name, values in statistics.items()}
        index = self._samples[-1].index + 1 if self._samples else 0
        if self._samples and self._samples[-1].index % self._stride:
            # It was there only for being the newest.
            self._samples.pop()
        self._samples.append(_Sample(index, step, {}, rows))
        if seen:
            self._pending.append((self._samples[-1], seen, np.stack([bins[layer] for layer in seen])))
        # Several at once take hardly longer than one.
        if len(self._pending) >= _MAX_PENDING:
            self._coarsen_pending()
        self._thin()

    def add_record(self, record: Record, statistics: Sequence[str]) -> None:
        """Add a training record: the distributions of all layers, the statistics of the activations.

        Args:
            record: What a monitor found out.
            statistics: Names of the statistics to keep.
        """
        bins = {path: layer.bins for path, layer in record.layers.items() if layer.bins is not None}
        # Half of the picture would be empty for layers without units.
        shown = [path for path in bins if record.layers[path].is_activation] or list(bins)
        numbers = {name: {path: record.layers[path].numbers.get(name) for path in shown} for name in statistics}
        self.add(record.step, bins, numbers)

    def state_dict(self) -> dict[str, Any]:
        """The history in lists, numbers and tensors on the CPU: what ``torch.load`` takes for safe."""
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
            "indices": [sample.index for sample in self._samples],
            "steps": [sample.step for sample in self._samples],
            "statistics": {name: torch.from_numpy(self.values(name)) for name in self.statistics},
            "anchors": torch.from_numpy(anchors),
            "shares": torch.from_numpy(shares),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, thinned if this history keeps less."""
        self._stride = state["stride"]
        self._layers = list(state["layers"])
        self._numbers = {layer: number for number, layer in enumerate(self._layers)}
        self._chosen = list(state["chosen_layers"])
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
        """Number the new layers and put each behind the one it followed; returns them."""
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
            # In one pass: to look for the place of each would take one for every layer.
            followed = [[layer, *behind.get(layer, ())] for layer in self._layers]
            self._layers = [*behind.get(None, ()), *(layer for group in followed for layer in group)]
        return new

    def _choose(self, candidates: Set[str]) -> None:
        """Choose among those chosen before and new ones: only they have all their distributions."""
        before = self._chosen
        self._chosen = evenly([layer for layer in self._layers if layer in candidates], self.max_layers)
        for layer in set(before) - set(self._chosen):
            for sample in self._samples:
                sample.distributions.pop(layer, None)

    def _row(self, values: Mapping[str, float | None]) -> NDArray[np.float32]:
        row = np.full(len(self._numbers), np.nan, dtype=np.float32)
        for layer, value in values.items():
            if value is not None:
                row[self._numbers[layer]] = value
        return row

    def _thin(self) -> None:
        while len(self._samples) > self.max_steps:
            self._stride *= 2
            *older, newest = self._samples
            self._samples = [*(sample for sample in older if sample.index % self._stride == 0), newest]


def evenly(items: Sequence[str], number: int) -> list[str]:
    """At most ``number`` items, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), number)).round().astype(int)
    return [items[index] for index in chosen]
