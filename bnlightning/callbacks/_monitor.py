"""The base class of the monitors' callbacks: it holds the schedule, tells loggers and callbacks, draws and warns."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bnlightning._check import check_integer
from bnlightning.callbacks._packages import BothPackages
from bnlightning.callbacks._state_key import described
from bnlightning.callbacks._steps import step_count, steps_taken
from bnlightning.compare.names import TRAIN, health_tag
from bnlightning.diagnosis.thresholds import Threshold, ill_layers, sentence
from bnlightning.diagnosis.troubles import Change, Troubles, table
from bnlightning.monitors.record import Record
from bnlightning.monitors.schedule import Schedule
from bnlightning.monitors.statistic import Catalogue, Look
from bnlightning.monitors.words import Mishaps
from bnlightning.writing.gallery import Gallery, Picture
from bnlightning.writing.summaries import Summaries, summarize
from bnlightning.writing.writers import write, writer_of


class MonitorCallback(BothPackages, Callback):
    """A callback that samples steps and gives a monitor's records to the loggers.

    What it does only for show, such as drawing and writing, never ends a training: it warns of the first error.

    Several monitors of one class may be in a Trainer. The numbers of the whole network of the second one have ``#1``
    behind their tag, and so on. A tag of a layer or a parameter is written by the first monitor that has it.

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
        # The number of steps that Lightning does not count, of the checkpoint that the fit goes on from.
        self._uncounted: int | None = None
        # The newest number of the whole network, by tag.
        self._health: dict[str, float] = {}
        self._metrics: dict[str, Any] | None = None
        self._written: set[str] = set()
        self._has_told_of_overlap = False
        self._start_showing()

    @property
    def troubles(self) -> Troubles:
        """What the monitor has warned of in this training."""
        return self._troubles

    @property
    def rules(self) -> list[str]:
        """What the monitor looks for, in words."""
        return [self._rule(threshold) for threshold in self.thresholds]

    @property
    def unset(self) -> list[str]:
        """The arguments of limits that are not set."""
        return [name for name, value in self._arguments().items() if name.startswith("warn_") and value is None]

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

    def _write(self, trainer: lightning.Trainer, record: Record) -> None:
        """Give a record of texts to all loggers. Only the first rank does so."""
        if trainer.is_global_zero:
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
            drawn = self._gallery.drawn(len(self._earlier(trainer)))
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
            monitors = [each for each in _callbacks(trainer) if isinstance(getattr(each, "troubles", None), Troubles)]
            troubles = [each.troubles for each in monitors]
            step = max((each.step for each in troubles), default=0)
            rules, unset = ([one for each in monitors for one in getattr(each, name)] for name in ("rules", "unset"))
            text = table(troubles, rules, unset, step)
            # All monitors draw at the same time.
            if all(each.told != text for each in monitors):
                self.told = text
                self._write(trainer, Record(step, texts={"warnings": text}))

    def _rule(self, threshold: Threshold) -> str:
        return f"{type(self).__name__}({threshold.argument}={threshold.limit:g})"

    # What tells apart several monitors of one class.

    def _arguments(self) -> dict[str, Any]:
        """All arguments by name. Two monitors of a class that differ in one have states of their own."""
        return {"every_n_steps": self.every_n_steps}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**described(self._arguments()))

    def _of_this_class(self, trainer: lightning.Trainer) -> list[Any]:
        """The monitors of this class in the Trainer, this one among them."""
        return [callback for callback in _callbacks(trainer) if type(callback) is type(self)]

    def _earlier(self, trainer: lightning.Trainer) -> list[Any]:
        """The monitors of this class that come before this one in the Trainer."""
        same = self._of_this_class(trainer)
        return same[: next((index for index, callback in enumerate(same) if callback is self), 0)]

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self._schedule.state_dict(),
            "uncounted": self._uncounted or 0,
            "health": dict(self._health),
            **self._state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            self._schedule.load_state_dict(state_dict["schedule"])
            self._uncounted = state_dict["uncounted"]
            self._health = dict(state_dict["health"])
            self._restore(state_dict)
        # Whatever a state of another form leads to.
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._schedule, self._uncounted, self._health = Schedule(self.every_n_steps), None, {}
            self._forget()
            rank_zero_warn(
                f"{type(self).__name__} cannot read its state in this checkpoint ({type(error).__name__}: {error}), "
                "which another version of bnlightning wrote. It starts afresh: its windows and pictures begin at this "
                "step. The training itself goes on as it should."
            )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning asks for the state before this hook, and gives it no Trainer.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            state["uncounted"] = step_count(trainer).state(trainer)

    def _state(self) -> dict[str, Any]:
        """What else a checkpoint keeps, as plain values and tensors."""
        return {"history": self._gallery.history.state_dict(), "troubles": self._troubles.state_dict()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`_state` returned."""
        self._gallery.history.load_state_dict(state["history"])
        self._troubles.load_state_dict(state["troubles"])

    def _forget(self) -> None:
        """Forget all earlier samples: a training begins anew."""
        self._start_showing()

    # What loggers and other callbacks are told.

    def _start(self, trainer: lightning.Trainer) -> bool:
        """Start a fit.

        Returns:
            Whether it goes on from the last sampled step: after a checkpoint, or after another fit.
        """
        step_count(trainer).start(trainer, self._uncounted)
        self._uncounted = None
        goes_on = self._schedule.start(steps_taken(trainer))
        if not goes_on:
            self._health = {}
            self._forget()
        # The dict itself: to ask for it in the middle of an evaluation would compute the metrics of the module.
        self._metrics = trainer.callback_metrics
        self._metrics.update({tag: torch.tensor(value) for tag, value in self._health.items()})
        return goes_on

    def _tell(self, trainer: lightning.Trainer, record: Record | None) -> None:
        """Give a record to other callbacks on all ranks that have it, and on the first rank to all loggers."""
        if record is None:
            return
        with self._mishaps.forgiven("write a record"):
            self._tell_of(trainer, record)

    def _tell_of(self, trainer: lightning.Trainer, record: Record) -> None:
        earlier = self._earlier(trainer)
        number = len(earlier)
        health = {health_tag(name, record.phase, number): value for name, value in record.health.items()}
        self._health |= health
        monitored = set(_monitored(trainer))
        if trainer.is_global_zero or monitored:
            summaries = summarize(record, self._catalogues, number)
            self._leave_to(earlier, summaries)
            health |= {tag: summaries.scalars[tag] for tag in monitored if tag in summaries.scalars}
            if trainer.is_global_zero:
                self._tell_loggers(trainer, summaries)
        if self._metrics is not None:
            self._metrics.update({tag: torch.tensor(value) for tag, value in health.items()})

    def _leave_to(self, earlier: Sequence["MonitorCallback"], summaries: Summaries) -> None:
        """Take out of the summaries what an earlier monitor of this class writes, too."""
        taken = [
            tag for tag in (*summaries.scalars, *summaries.histograms) if any(tag in one._written for one in earlier)
        ]
        for tag in taken:
            summaries.scalars.pop(tag, None)
            summaries.histograms.pop(tag, None)
        self._written.update(summaries.scalars, summaries.histograms)
        if taken and not self._has_told_of_overlap:
            self._has_told_of_overlap = True
            rank_zero_warn(
                f"{type(self).__name__} number {len(earlier) + 1} in the Trainer has {len(taken)} tag(s) that one "
                f"before it has, too, such as {taken[0]!r}. Only the first one writes them. Let the two watch "
                f"other layers or parameters. Numbers of the whole network stand apart: '#{len(earlier)}' is behind "
                "their tag."
            )

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


def _monitored(trainer: lightning.Trainer) -> Iterator[str]:
    """The tags of layers and parameters that a callback or a learning rate scheduler monitors."""
    for owner in (*_callbacks(trainer), *trainer.lr_scheduler_configs):
        monitor = getattr(owner, "monitor", None)
        if isinstance(monitor, str):
            yield monitor


def _callbacks(trainer: lightning.Trainer) -> list[Any]:
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return found
