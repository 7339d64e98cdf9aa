"""The one datum of the package, the Record: what a monitor found out at one sampled step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bnlightning.compare.names import TRAIN
from bnlightning.monitors.counting.histogram import Histogram


@dataclass(frozen=True)
class Entry:
    """The numbers of one layer, one batch norm layer or one parameter at one sampled step.

    Args:
        numbers: The numbers, by name of the statistic.
        histograms: The histograms, by name, as loggers show them. Far outliers are counted in the outermost bin.
        bins: Counts by :func:`~bnlightning.monitors.counting.histogram.count_values`, int64 of shape ``(NUM_BINS,)``.
            Values beyond the range of float32 are in its outermost bins. ``None`` where they are not kept.
        units: Number of units of a layer. 0 where units are not looked at.
        samples: Number of samples that the numbers of the units are over. 0 where units are not looked at.
        is_activation: Whether the layer counts as an activation, and so under ``health/``.
        is_weight: Whether it is a parameter of two or more dimensions.
        module: Class of the layer's module, or of the one that a parameter belongs to, such as ``"ReLU"``.
    """

    numbers: Mapping[str, float]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    bins: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    units: int = 0
    samples: int = 0
    is_activation: bool = False
    is_weight: bool = False
    module: str = ""


@dataclass(frozen=True)
class Record:
    """What a monitor found out at one sampled step, over all samples, micro-batches and ranks of it.

    Tags, pictures, findings and tables are pure functions of records.

    Args:
        step: Number of steps taken before, its place on the x-axis.
        phase: ``"train"``, ``"val"`` or ``"test"``.
        layers: The watched layers, by path with the number of the call, in the order of execution.
        norms: The batch norm layers, by path.
        parameters: The parameters, by path.
        health: The numbers of the whole network, by name.
        texts: Texts on the whole network, by name.

    Example:
        >>> record = Record(step=100, layers={"net.act1": Entry({"dead": 0.25})}, health={"dead": 0.25})
        >>> record.entries("layer")["net.act1"].numbers["dead"]
        0.25
    """

    step: int
    phase: str = TRAIN
    layers: Mapping[str, Entry] = field(default_factory=dict)
    norms: Mapping[str, Entry] = field(default_factory=dict)
    parameters: Mapping[str, Entry] = field(default_factory=dict)
    health: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def entries(self, kind: str) -> Mapping[str, Entry]:
        """The entries of a kind: ``"layer"``, ``"norm"`` or ``"param"``."""
        return {"layer": self.layers, "norm": self.norms, "param": self.parameters}[kind]
