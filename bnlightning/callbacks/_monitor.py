"""The base class of the monitors' callbacks: it holds the schedule, gives records to loggers, draws and warns."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bnlightning._check import check_integer
from bnlightning.compare.names import TRAIN
from bnlightning.diagnosis.thresholds import Threshold, ill_layers, sentence
from bnlightning.diagnosis.troubles import Change, Troubles, table
from bnlightning.monitors.record import Record
from bnlightning.monitors.schedule import Schedule
from bnlightning.monitors.statistic import Catalogue, Look
from bnlightning.monitors.words import Mishaps
from bnlightning.writing.gallery import Gallery, Picture
from bnlightning.writing.summaries import Summaries, summarize
from bnlightning.writing.writers import write, writer_of


class MonitorCallback(Callback):
    """A callback that samples steps and gives a monitor's records to the loggers.

    What it does only for show, such as drawing and writing, never ends a training: it warns of the first error.

    Args:
        every_n_steps: Distance between two sampled steps, in optimizer steps.
        catalogues: The declarations of the numbers that it writes.
        kind: What its pictures have in rows: ``"layer"``, ``"param"`` or ``"norm"``.
        pictures: Its pictures of a whole run.
        thresholds: The limits that it warns of.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        every_n_steps: int,
        catalogues: Sequence[Catalogue[Any, Any]],
        kind: str = "layer",
        pictures: Sequence[Picture] = (),
        thresholds: Sequence[Threshold] = (),
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self.thresholds = thresholds
        self._catalogues = catalogues
        self._schedule = Schedule(every_n_steps)
        self._mishaps = Mishaps(type(self).__name__)
        self._kind, self._pictures = kind, pictures
        self._start_showing()

    @property
    def troubles(self) -> Troubles:
        """What the monitor has warned of in this training."""
        return self._troubles

    @property
    def rules(self) -> list[str]:
        """What the monitor looks for, in words."""
        return [self._rule(threshold) for threshold in self.thresholds]

    def _start_showing(self) -> None:
        """Forget what was shown: a training begins anew."""
        looks: dict[str, Look] = self._catalogues[0].looks() if self._catalogues else {}
        self._gallery = Gallery(self._kind, looks, self._pictures)
        self._troubles = Troubles()
        # The last table of warnings that this monitor wrote.
        self.told = ""

    def _check_loggers(self, trainer: lightning.Trainer) -> None:
        """Refuse a logger that cannot be told anything, before the training begins."""
        for logger in trainer.loggers:
            writer_of(logger)

    def _write(self, trainer: lightning.Trainer, record: Record | None) -> None:
        """Give a record to all loggers. Only the first rank does so."""
        if record is not None and trainer.is_global_zero:
            with self._mishaps.forgiven("write a record"):
                self._tell_loggers(trainer, summarize(record, self._catalogues))

    def _tell_loggers(self, trainer: lightning.Trainer, summaries: Summaries) -> None:
        summaries.mishaps = self._mishaps
        write(trainer.loggers, summaries)

    def _show(self, trainer: lightning.Trainer, record: Record, needed: int = 0) -> None:
        """Keep a record for the pictures, warn of what is wrong in it, and of what is no more.

        Args:
            trainer: The trainer.
            record: The record of a sampled step or an evaluation.
            needed: Least number of samples that a number over the window must be over to be believed.
        """
        for threshold in self.thresholds:
            self._look_for(trainer, threshold, record, needed)
        if record.phase != TRAIN or not trainer.is_global_zero:
            return
        self._troubles.step = max(self._troubles.step, record.step)
        if not self.told:
            self._write_warnings(trainer)
        with self._mishaps.forgiven("keep a sample for the pictures"):
            self._gallery.add(record)
            if self._gallery.is_due_early and not _is_about_to_end_epoch(trainer):
                self._draw(trainer)

    def _draw(self, trainer: lightning.Trainer) -> None:
        """Draw pictures of all samples so far, if there are new ones, and bring the table of warnings up to date."""
        if not trainer.is_global_zero:
            return
        with self._mishaps.forgiven("draw the pictures"):
            drawn = self._gallery.drawn()
            for summaries in drawn:
                self._tell_loggers(trainer, summaries)
            if drawn:
                self._write_warnings(trainer)

    def _draw_after_epoch(self, trainer: lightning.Trainer) -> None:
        if self._gallery.is_due_after(trainer.current_epoch):
            self._draw(trainer)

    def _look_for(self, trainer: lightning.Trainer, threshold: Threshold, record: Record, needed: int) -> None:
        rule, warning = self._rule(threshold), ""
        change = Change(False, False, False)
        with self._mishaps.forgiven(f"check {threshold.argument}"):
            ill = ill_layers(threshold, record, needed)
            warning = f"{rule}: {sentence(threshold, ill)}" if ill else ""
            change = self._take_down(trainer, rule, record.phase, record.step, ill)
        # Not within the block above: who turns warnings into errors wants this one to be an error.
        if change.began and change.is_told:
            rank_zero_warn(warning)
        if change.ended and change.is_told:
            rank_zero_info(f"{rule}: no layer is above the limit any more at step {record.step}.")

    def _take_down(
        self, trainer: lightning.Trainer, rule: str, phase: str, step: int, ill: Mapping[str, str]
    ) -> Change:
        """Take down what is wrong, and write the table of warnings if it has changed."""
        before = self._troubles.rows
        change = self._troubles.update(rule, phase, step, ill)
        if self._troubles.rows != before:
            self._write_warnings(trainer)
        return change

    def _write_warnings(self, trainer: lightning.Trainer) -> None:
        """Write the table of the warnings of all monitors."""
        if not trainer.is_global_zero:
            return
        with self._mishaps.forgiven("write the table of warnings"):
            # Not by class: that of another of Lightning's packages is another one.
            others = getattr(trainer, "callbacks", [])
            monitors = [each for each in others if isinstance(getattr(each, "troubles", None), Troubles)]
            troubles = [each.troubles for each in monitors]
            step = max((each.step for each in troubles), default=0)
            text = table(troubles, [rule for each in monitors for rule in each.rules], step)
            # All monitors draw at the same time.
            if all(each.told != text for each in monitors):
                self.told = text
                self._write(trainer, Record(step, texts={"warnings": text}))

    def _rule(self, threshold: Threshold) -> str:
        return f"{type(self).__name__}({threshold.argument}={threshold.limit:g})"

    def _shown_state(self) -> dict[str, Any]:
        """The state of the pictures and the warnings, for a checkpoint."""
        return {"history": self._gallery.history.state_dict(), "troubles": self._troubles.state_dict()}

    def _load_shown_state(self, state: Mapping[str, Any]) -> None:
        self._gallery.history.load_state_dict(state["history"])
        self._troubles.load_state_dict(state["troubles"])

    def _warn_of_nothing(self, argument: str, value: Any, module: object, cure: str) -> None:
        rank_zero_warn(
            f"{type(self).__name__}({argument}={value!r}) finds nothing to watch in {type(module).__name__}: {cure}"
        )

    def _warn_of_left_out(self, argument: str, watched: int, left_out: Collection[str], what: str, cure: str) -> None:
        first = f" from {next(iter(left_out))} on" if left_out else ""
        rank_zero_warn(
            f"{type(self).__name__}({argument}={getattr(self, argument)}) leaves out {len(left_out)} of "
            f"{watched + len(left_out)} {what}{first}: raise {argument}, or choose {cure}"
        )


def _is_about_to_end_epoch(trainer: lightning.Trainer) -> bool:
    """Whether the first epoch, at whose end pictures are drawn, has fewer batches to come than it had."""
    done = trainer.fit_loop.batch_idx + 1
    return trainer.current_epoch == 0 and trainer.num_training_batches - done < done
