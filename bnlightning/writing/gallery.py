"""The pictures of a run: what they are drawn from, and when."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnlightning.compare.names import health_tag
from bnlightning.monitors.record import Record
from bnlightning.monitors.statistic import Look
from bnlightning.writing.history import History
from bnlightning.writing.summaries import Summaries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[History, Mapping[str, Look]], "Figure"]


@dataclass(frozen=True)
class Picture:
    """One picture of a run.

    Args:
        name: Its name: the tag is ``health/<name>``.
        draw: Draws it from the samples so far and the looks of the statistics.
        description: What it shows, over which samples, steps and ranks, and what is healthy. In Markdown.
    """

    name: str
    draw: Draw
    description: str


class Gallery:
    """The pictures of a run so far. The number of times they are drawn grows with the logarithm of its length.

    They are drawn after the second sample, at the end of the epochs 1, 2, 4, 8 and so on, and when a fit ends, however
    it ends. A picture shows about twice as much as before, so drawing is a vanishing part of a long training.

    Args:
        kind: What the rows are: ``"layer"``, ``"param"`` or ``"norm"``.
        looks: The statistics that are kept, with their looks.
        pictures: The pictures.

    Example:
        >>> from bnlightning.monitors.record import Record
        >>> gallery = Gallery("layer", {}, [])
        >>> for step in (0, 10, 20):
        ...     gallery.add(Record(step))
        ...     print(step, gallery.is_due_early)
        0 False
        10 True
        20 False
    """

    def __init__(self, kind: str, looks: Mapping[str, Look], pictures: Sequence[Picture]) -> None:
        self.kind = kind
        self.looks = looks
        self.pictures = pictures
        self.history = History()
        self._drawn_at = -1

    @property
    def is_due_early(self) -> bool:
        """Whether there is now enough for a first picture: a second sample."""
        return len(self.history.steps) == 2 and self._drawn_at < 0

    @staticmethod
    def is_due_after(epoch: int) -> bool:
        """Whether the pictures are drawn at the end of an epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Example:
            >>> [epoch for epoch in range(16) if Gallery.is_due_after(epoch)]
            [0, 1, 3, 7, 15]
        """
        return (epoch + 1) & epoch == 0

    def add(self, record: Record) -> None:
        """Add a sampled training step."""
        self.history.add_record(record, self.looks, self.kind)

    def drawn(self, number: int = 0) -> list[Summaries]:
        """What loggers are told of the samples so far: each picture by itself. Nothing if there is nothing new.

        Args:
            number: How many monitors of the same kind come before this one. It tells apart their pictures.
        """
        steps = self.history.steps
        # A single step makes no picture.
        if len(steps) < 2 or steps[-1] == self._drawn_at:
            return []
        self._drawn_at = step = int(steps[-1])
        return [self._summaries(picture, health_tag(picture.name, number=number), step) for picture in self.pictures]

    def _summaries(self, picture: Picture, tag: str, step: int) -> Summaries:
        pictures = {tag: lambda: picture.draw(self.history, self.looks)}
        return Summaries(step, pictures=pictures, describe={tag: picture.description}.get)
