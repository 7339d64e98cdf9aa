"""Published values beside those of a run, in the logger."""

from collections.abc import Mapping, Sequence
from typing import Any

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


class PublishedCurve(Callback):
    """Log how somebody else's metric went in training beside how this run's goes, so that a comparison shows both.

    For any LightningModule that logs the metric while it trains. Logged at the end of the training batch in which so
    many optimizer steps are taken: ``published/<metric>``, e.g. ``published/val/acc``. A run that is resumed logs the
    values after the step it goes on from, one that is stopped those before.

    Args:
        metric: The metric's tag, such as ``val/acc``.
        values: What was published, after ``every_n_steps`` optimizer steps, after twice as many, and so on.
        every_n_steps: The distance of two values in optimizer steps: with one value an epoch the steps of an epoch.

    Raises:
        ValueError: If ``values`` is empty, a value is not a finite number, or ``every_n_steps`` not an integer of at
            least 1.

    Example:
        >>> curve = PublishedCurve("val/acc", values=[0.9171, 0.9364, 0.9468], every_n_steps=500)
        >>> trainer = lightning.Trainer(callbacks=[curve])
    """

    def __init__(self, metric: str, values: Sequence[float], every_n_steps: int) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        if not len(values):
            raise ValueError(f"values={values!r} is not possible: give the published values, one at least.")
        for index, value in enumerate(values):
            check_number(f"values[{index}]", value)
        self.metric = metric
        self.values = list(values)
        self.every_n_steps = every_n_steps
        self._logged = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._logged = trainer.global_step // self.every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With several optimizers, a batch may step over a value's step.
        reached = min(trainer.global_step // self.every_n_steps, len(self.values))
        for index in range(self._logged, reached):
            for logger in trainer.loggers:
                logger.log_metrics({f"published/{self.metric}": self.values[index]}, (index + 1) * self.every_n_steps)
        self._logged = max(self._logged, reached)
