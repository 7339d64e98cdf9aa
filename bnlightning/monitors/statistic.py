"""How a number is declared: everything the package knows of it stands in one place.

A :class:`Statistic` says how a number is computed, what it is called and what it means. It says what is healthy, how a
picture shows it and what a warning says. Tags, descriptions, pictures and warnings follow from it. A new number is one
more declaration in a catalogue.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from bnlightning.monitors.counting.layers import Sum
from bnlightning.monitors.words import Mishaps

Counts = TypeVar("Counts")
Part = TypeVar("Part")

Palette = Literal["alarm", "low", "neutral", "two_sided"]
_SHARE = {0.0: "0", 0.5: "0.5", 1.0: "1"}


@dataclass(frozen=True)
class Look:
    """The look of a statistic in the picture of all layers by step.

    Args:
        title: Heading of its heat map.
        palette: ``"alarm"`` where high values are ill, ``"low"`` where low ones are, ``"two_sided"`` where both ends
            are, ``"neutral"`` where neither end is.
        low: Lowest value that the colours tell apart.
        high: Highest value that the colours tell apart.
        ticks: Labels of the colour scale, by value. Without any there is no scale.
        log: Whether the colours follow the logarithm of the value.
        healthy: The lowest and the highest healthy value. All between them is white. ``None``: only what has the
            palest colour of the palette.
        relative: Whether a value is divided by that of the last layer at the same step.
        absent: The value of a layer that has other numbers but not this one. ``None``: it was not measured.
        word: Name of it in a layer's caption, such as ``"dead units"``. ``None``: captions leave it out.
        word_above: Share above which the caption mentions it.

    Example:
        >>> look = Look("kurtosis", high=100.0, ticks={0.0: "0", 100.0: "100"})
    """

    title: str
    palette: Palette = "alarm"
    low: float = 0.0
    high: float = 1.0
    ticks: Mapping[float, str] = field(default_factory=lambda: _SHARE)
    log: bool = False
    healthy: tuple[float, float] | None = None
    relative: bool = False
    absent: float | None = None
    word: str | None = None
    word_above: float = 0.005


@dataclass(frozen=True)
class Alarm:
    """The words of the warning when a statistic exceeds its limit.

    Args:
        meaning: The words behind the share, such as ``"of the units were zero for the last {samples} samples"``. The
            number of samples of the window takes the place of ``{samples}``. A number that is no share takes the place
            of ``{value}``.
        cures: The usual cures, as a list within a sentence.
        zero: The words in the place of ``meaning`` for a zero that is compared with other layers.
        of_window: Whether the share is over the window, which has to be full first. Otherwise it is of one step.
    """

    meaning: str
    cures: str
    zero: str = ""
    of_window: bool = True


@dataclass(frozen=True)
class Statistic(Generic[Counts]):
    """A number of a layer, a parameter or a batch norm layer.

    Args:
        name: Its name in tags, such as ``"dead"`` in ``layer_dead/<path>``.
        of: Computes it from what was counted. ``None`` where the number does not exist.
        description: What it is, and over which samples, steps and ranks. Whole sentences in Markdown.
        healthy: The healthy values, and what to do about others. Sentences in Markdown, which follow ``Healthy:``.
        sum: A further accumulator that it needs. ``None``: what is counted for every layer is enough.
        look: How the picture of all layers shows it. ``None``: the picture leaves it out.
        alarm: The words of a warning. ``None``: there is no warning.

    Example:
        >>> spread = Statistic(
        ...     name="range",
        ...     of=lambda layer: layer.values.maximum - layer.values.minimum,
        ...     description="Largest minus smallest finite value of the sampled step, over all ranks.",
        ...     healthy="Steady over the steps.",
        ... )
    """

    name: str
    of: Callable[[Counts], float | None]
    description: str
    healthy: str
    sum: Sum | None = None
    look: Look | None = None
    alarm: Alarm | None = None


@dataclass(frozen=True)
class Summary(Generic[Part]):
    """A number of the whole network, under ``health/``.

    Args:
        name: Its name in the tag, such as ``"dead_max"``.
        of: Computes it from the layers or parameters of the network. ``None`` where the number does not exist.
        description: What it is, and over which layers, samples, steps and ranks.
        healthy: The healthy values, and what to do about others.

    Example:
        >>> worst = Summary(
        ...     name="range_max",
        ...     of=lambda layers: max((layer.numbers["range"] for layer in layers), default=None),
        ...     description="Largest range of all layers at the sampled step, over all ranks.",
        ...     healthy="Steady over the steps.",
        ... )
    """

    name: str
    of: Callable[[Sequence[Part]], float | None]
    description: str
    healthy: str


@dataclass(frozen=True)
class Catalogue(Generic[Counts, Part]):
    """All numbers of one kind: of layers, of parameters or of batch norm layers.

    Args:
        kind: ``"layer"``, ``"param"`` or ``"norm"``, the beginning of the tags.
        statistics: The numbers of each layer or parameter.
        summaries: The numbers of the whole network.
        histograms: Description of each histogram, by its name in tags.

    Raises:
        ValueError: If the name of a statistic would make another tag, or is there twice.

    Example:
        >>> half = Statistic("half", lambda x: x / 2, "Half of it.", "Small.")
        >>> catalogue = Catalogue("layer", [half])
        >>> catalogue.numbers(3)
        {'half': 1.5}
        >>> catalogue.description("half")
        'Half of it. Healthy: Small.'
    """

    kind: str
    statistics: Sequence[Statistic[Counts]]
    summaries: Sequence[Summary[Part]] = ()
    histograms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [one.name for one in self.statistics]
        for name in names:
            if not re.fullmatch(r"(?!val_|test_)[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"statistics with the name {name!r} are not possible: give a name of small letters, digits and _ "
                    "that does not begin with val_ or test_."
                )
            if names.count(name) > 1:
                raise ValueError(f"statistics with the name {name!r} are there twice: give each a name of its own.")

    def numbers(self, counts: Counts, mishaps: Mishaps | None = None) -> dict[str, float]:
        """The numbers that exist for one layer or parameter, by name.

        Args:
            counts: What was counted.
            mishaps: Tells the error of a statistic, which is then left out. ``None``: the error is raised.
        """
        return _existing(self.statistics, counts, mishaps)

    def health(self, parts: Sequence[Part], mishaps: Mishaps | None = None) -> dict[str, float]:
        """The numbers that exist for the whole network, by name.

        Args:
            parts: The layers or parameters.
            mishaps: As in :meth:`numbers`.
        """
        return _existing(self.summaries, parts, mishaps)

    def description(self, name: str) -> str | None:
        """The description of a number or a histogram. ``None`` if this catalogue does not have it."""
        if name in self.histograms:
            return self.histograms[name]
        return next((_in_words(one) for one in self.statistics if one.name == name), None)

    def health_description(self, name: str) -> str | None:
        """The description of a number of the whole network. ``None`` if this catalogue does not have it."""
        return next((_in_words(one) for one in self.summaries if one.name == name), None)

    def looks(self) -> dict[str, Look]:
        """The looks of the statistics that the picture shows, by name."""
        return {statistic.name: statistic.look for statistic in self.statistics if statistic.look is not None}


def _existing(
    declared: Iterable[Statistic[Any] | Summary[Any]], counts: Any, mishaps: Mishaps | None
) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in declared:
        with nullcontext() if mishaps is None else mishaps.forgiven(f"compute the statistic {one.name!r}"):
            value = one.of(counts)
            if value is not None:
                found[one.name] = float(value)
    return found


def _in_words(declared: Statistic[Counts] | Summary[Part]) -> str:
    return f"{declared.description} Healthy: {declared.healthy}"
