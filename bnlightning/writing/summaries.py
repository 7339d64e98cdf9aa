"""From a Record to what loggers are told: a pure function."""

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
    "watched": "Which layers are watched, and which cannot be.",
    "first_nonfinite_layer": "The module that made the first NaN or infinity, at the step at which it did.",
}


@dataclass
class Summaries:
    """Everything that loggers are told at one step.

    Args:
        step: Where it stands on the x-axis.
        scalars: Numbers by tag.
        histograms: Histograms by tag, for loggers that have histograms.
        texts: Texts by tag, for loggers that have texts.
        pictures: Functions that draw, by tag, for loggers that have images. They are called only if there is one.
        descriptions: What each tag means, by tag, for loggers that show it.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)


def summarize(record: Record, catalogues: Sequence[Catalogue[Any, Any]]) -> Summaries:
    """What loggers are told of a record.

    Args:
        record: What a monitor found out.
        catalogues: The declarations of its numbers, for the descriptions.
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
    """Looked up when a logger asks, which it does once a tag."""

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
