"""The base class of the monitors' callbacks: it holds the schedule, tells loggers and other callbacks, and warns."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from bnlightning._check import check_integer
from bnlightning.callbacks._packages import BothPackages
from bnlightning.callbacks._state_key import described
from bnlightning.callbacks._steps import step_count, steps_taken
from bnlightning.compare.names import health_tag
from bnlightning.monitors.record import Record
from bnlightning.monitors.schedule import Schedule
from bnlightning.monitors.statistic import Catalogue
from bnlightning.writing.summaries import Summaries, summarize
from bnlightning.writing.writers import write


class MonitorCallback(BothPackages, Callback):
    """A callback that samples steps and gives a monitor's records to the loggers.

    Several monitors of one class may be in a Trainer. The numbers of the whole network of the second one have ``#1``
    behind their tag, and so on. A tag of a layer or a parameter is written by the first monitor that has it.

    Args:
        every_n_steps: Distance between two sampled steps, in optimizer steps.
        catalogues: The declarations of the numbers that it writes.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int, catalogues: Sequence[Catalogue[Any, Any]]) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self._catalogues = catalogues
        self._schedule = Schedule(every_n_steps)
        # The number of steps that Lightning does not count, of the checkpoint that the fit goes on from.
        self._uncounted: int | None = None
        # The newest number of the whole network, by tag.
        self._health: dict[str, float] = {}
        self._metrics: dict[str, Any] | None = None
        self._written: set[str] = set()
        self._has_told_of_overlap = False

    # What tells apart several monitors of one class.

    def _arguments(self) -> dict[str, Any]:
        """All arguments by name. Two monitors of a class that differ in one have states of their own."""
        return {"every_n_steps": self.every_n_steps}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**described(self._arguments()))

    def _of_this_class(self, trainer: lightning.Trainer) -> list[Any]:
        """The monitors of this class in the Trainer, this one among them."""
        return [callback for callback in trainer.callbacks if type(callback) is type(self)]  # type: ignore[attr-defined]

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
        return {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`_state` returned."""

    def _forget(self) -> None:
        """Forget all earlier samples: a training begins anew."""

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
                write(trainer.loggers, summaries)
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


def _monitored(trainer: lightning.Trainer) -> Iterator[str]:
    """The tags of layers and parameters that a callback or a learning rate scheduler monitors."""
    owners = (*trainer.callbacks, *trainer.lr_scheduler_configs)  # type: ignore[attr-defined]
    for owner in owners:
        monitor = getattr(owner, "monitor", None)
        if isinstance(monitor, str):
            yield monitor
