"""The summaries that loggers are told, made from a Record by a pure function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bnlightning.compare.names import KINDS, Tag, health_tag, parse_tag
from bnlightning.monitors.counting.histogram import Histogram
from bnlightning.monitors.record import Record
from bnlightning.monitors.statistic import Catalogue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXTS = {
    "watched": "The layers that are watched, and the modules that cannot be watched.",
    "first_nonfinite_layer": "The module that made the first NaN or infinity of the training, at the step at which it "
    "did. `input`: it came with the batch. `before` or `after` a module: an operation that is no module made it. "
    "Healthy: This text does not exist. Try a lower learning rate, a warm-up, or gradient clipping.",
}


@dataclass
class Summaries:
    """Everything that loggers are told at one step.

    Args:
        step: Number of steps taken before, its place on the x-axis.
        scalars: Numbers by tag.
        histograms: Histograms by tag, for loggers that have histograms.
        texts: Texts by tag, for loggers that have texts.
        pictures: Functions that draw, by tag. They are called only for loggers that have images.
        descriptions: Descriptions in Markdown, by tag, for loggers that show them.

    Example:
        >>> summaries = Summaries(step=100, scalars={"health/dead": 0.25})
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)


def summarize(record: Record, catalogues: Sequence[Catalogue[Any, Any]]) -> Summaries:
    """Make what loggers are told from a record.

    Args:
        record: The record of a monitor.
        catalogues: The declarations of its numbers, which hold the descriptions.

    Example:
        >>> from bnlightning.monitors.record import Entry
        >>> record = Record(step=100, phase="val", layers={"net.act1": Entry({"dead": 0.25})})
        >>> summarize(record, []).scalars
        {'layer_val_dead/net.act1': 0.25}
    """
    summaries = Summaries(record.step, descriptions=_Descriptions(catalogues))
    for kind in KINDS:
        for path, entry in record.entries(kind).items():
            for name, value in entry.numbers.items():
                summaries.scalars[str(Tag(kind, name, path, record.phase))] = value
            for name, histogram in entry.histograms.items():
                summaries.histograms[str(Tag(kind, name, path, record.phase))] = histogram
    summaries.scalars |= {health_tag(name, record.phase): value for name, value in record.health.items()}
    summaries.texts |= {health_tag(name, record.phase): text for name, text in record.texts.items()}
    return summaries


class _Descriptions(Mapping[str, str]):
    """The descriptions by tag, looked up only when a logger asks. It asks once for each tag."""

    def __init__(self, catalogues: Sequence[Catalogue[Any, Any]]) -> None:
        self._catalogues = catalogues

    def __getitem__(self, name: str) -> str:
        tag = parse_tag(name)
        for catalogue in self._catalogues:
            found = self._health(catalogue, name) if tag is None else self._of(catalogue, tag)
            if found is not None:
                return found
        group, _, text = name.partition("/")
        if group == "health" and text in _TEXTS:
            return _TEXTS[text]
        raise KeyError(name)

    def _of(self, catalogue: Catalogue[Any, Any], tag: Tag) -> str | None:
        return catalogue.description(tag.statistic) if tag.kind == catalogue.kind else None

    def _health(self, catalogue: Catalogue[Any, Any], name: str) -> str | None:
        return catalogue.health_description(name.removeprefix("health/").removeprefix("val_").removeprefix("test_"))

    def __iter__(self) -> Any:
        raise TypeError("descriptions are looked up by tag")

    def __len__(self) -> int:
        return len(self._catalogues)
