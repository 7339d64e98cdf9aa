"""Published values beside those of a run, in the logger."""

from collections.abc import Mapping

import lightning
from lightning.pytorch.callbacks import Callback

from bnlightning._check import check_integer, check_number


class PublishedValues(Callback):
    """Log what somebody else measured beside what this run's test measures, so that a comparison shows both.

    For any LightningModule with a ``test_step``. Logged at the end of the test, at the number of optimizer steps taken:
    ``published/<name>``, the value that was published for the metric ``test/<name>``.

    Args:
        values: By name, that of the metric less its ``test/``.
        step: The number of optimizer steps after which they hold; a test after another number logs none of them.
            ``None``: any.

    Raises:
        ValueError: If a value is not a finite number, or ``step`` not an integer of at least 0.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[PublishedValues({"acc": 0.9723})])
    """

    def __init__(self, values: Mapping[str, float], step: int | None = None) -> None:
        for name, value in values.items():
            check_number(f"values[{name!r}]", value)
        if step is not None:
            check_integer("step", step, at_least=0)
        self.values = dict(values)
        self.step = step

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.step not in (None, trainer.global_step):
            return
        published = {f"published/{name}": value for name, value in self.values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(published, step=trainer.global_step)
