"""The summaries that loggers are told, made from a Record by a pure function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bnlightning.compare.names import KINDS, TEST, VAL, Tag, health_tag, parse_tag
from bnlightning.monitors.counting.histogram import Histogram
from bnlightning.monitors.record import Record
from bnlightning.monitors.statistic import Catalogue
from bnlightning.monitors.words import Mishaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXTS = {
    "watched": "The layers that are watched, and the modules that cannot be watched.",
    "warnings": "The warnings of all monitors, newest first: since which step, which layer, what, and whether it goes "
    "on or has ended. Healthy: nothing found. What was looked for stands below, with the arguments that set it.",
    "first_nonfinite_layer": "Where the first NaN or infinity was that made a training loss non-finite, at its step: "
    "the module that put it out. `before` or `after` a module: an operation that is no module made it. "
    "`input:<entry>`: it came with the batch. `parameter` or `buffer`: it was there before the step. "
    "Healthy: This text does not exist. Try a lower learning rate, a warm-up, or gradient clipping.",
}


def _nothing(tag: str) -> None:
    return None


@dataclass
class Summaries:
    """Everything that loggers are told at one step.

    Args:
        step: Number of steps taken before, its place on the x-axis.
        scalars: Numbers by tag.
        histograms: Histograms by tag, for loggers that have histograms.
        texts: Texts by tag, for loggers that have texts.
        pictures: Functions that draw, by tag. They are called only for loggers that have images. Give them to
            :func:`~bnlightning.writing.canvas.draw_png`, which draws with matplotlib's default settings.
        describe: Returns the description of a tag in Markdown, or ``None``, for loggers that show it.
        mishaps: Tells the error of what is only for show, as in ``with summaries.mishaps.forgiven("draw a picture"):``.

    Example:
        >>> summaries = Summaries(step=100, scalars={"health/dead": 0.25})
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    describe: Callable[[str], str | None] = _nothing
    mishaps: Mishaps = field(default_factory=Mishaps, compare=False)


def summarize(record: Record, catalogues: Sequence[Catalogue[Any, Any]], number: int = 0) -> Summaries:
    """Make what loggers are told from a record.

    Args:
        record: The record of a monitor.
        catalogues: The declarations of its numbers, which hold the descriptions.
        number: How many monitors of the same kind come before this one. It tells apart what is on the whole network.

    Example:
        >>> from bnlightning.monitors.record import Entry, Record
        >>> record = Record(step=100, phase="val", layers={"net.act1": Entry({"dead": 0.25})})
        >>> summarize(record, []).scalars
        {'layer_val_dead/net.act1': 0.25}
    """
    summaries = Summaries(record.step, describe=partial(_description, catalogues))
    for kind in KINDS:
        for path, entry in record.entries(kind).items():
            for name, value in entry.numbers.items():
                summaries.scalars[str(Tag(kind, name, path, record.phase))] = value
            for name, histogram in entry.histograms.items():
                summaries.histograms[str(Tag(kind, name, path, record.phase))] = histogram
    summaries.scalars |= {health_tag(name, record.phase, number): value for name, value in record.health.items()}
    # Texts are about the network, in whatever phase they are told.
    summaries.texts |= {health_tag(name, number=number): text for name, text in record.texts.items()}
    return summaries


def _description(catalogues: Sequence[Catalogue[Any, Any]], name: str) -> str | None:
    """Look the description of a tag up; a logger asks once for each tag."""
    tag = parse_tag(name)
    if tag is not None:
        found = [each.description(tag.statistic) for each in catalogues if each.kind == tag.kind]
    else:
        group, _, rest = name.partition("#")[0].partition("/")
        short = rest.removeprefix(f"{VAL}_").removeprefix(f"{TEST}_") if group == "health" else ""
        found = [each.health_description(short) for each in catalogues] + [_TEXTS.get(short)]
    return next((text for text in found if text is not None), None)
