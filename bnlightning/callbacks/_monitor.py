"""The base class of the monitors' callbacks: it holds the schedule, gives records to loggers, and warns."""

from collections.abc import Collection, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from bnlightning._check import check_integer
from bnlightning.monitors.record import Record
from bnlightning.monitors.schedule import Schedule
from bnlightning.monitors.statistic import Catalogue
from bnlightning.writing.summaries import summarize
from bnlightning.writing.writers import write


class MonitorCallback(Callback):
    """A callback that samples steps and gives a monitor's records to the loggers.

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

    def _write(self, trainer: lightning.Trainer, record: Record | None) -> None:
        """Give a record to all loggers. Only the first rank does so."""
        if record is not None and trainer.is_global_zero:
            write(trainer.loggers, summarize(record, self._catalogues))

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
