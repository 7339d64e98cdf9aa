"""Callbacks that log published values beside those of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from bnlightning._check import check_integer, check_number
from bnlightning.callbacks._packages import BothPackages
from bnlightning.callbacks._steps import step_count, steps_taken


class PublishedValues(BothPackages, Callback):
    """Log published results beside the results of this run's test, so that a comparison shows both.

    It works with any LightningModule with a ``test_step``.

    Logs:
        ``published/<name>``: the published value of the metric ``test/<name>``. It is logged at the end of the test, at
        the number of optimizer steps taken.

    Args:
        values: Published values by the metric's name without its ``test/``.
        step: Number of optimizer steps after which the values hold. A test after another number of steps logs none of
            them. By default every test logs them.

    Raises:
        ValueError: If a value is not a finite number, or ``step`` is not an integer of at least 0.

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
        if self.step not in (None, steps_taken(trainer)):
            return
        published = {f"published/{name}": value for name, value in self.values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(published, step=steps_taken(trainer))


class PublishedCurve(BothPackages, Callback):
    """Log a published curve of a metric beside the curve of this run, so that a comparison shows both.

    It works with any LightningModule that logs the metric while it trains. A resumed run logs the values after the step
    that it resumes from. A stopped run logs the values up to its last step.

    Logs:
        ``published/<metric>``, such as ``published/val/acc``: one published value, at its own step. It is logged at the
        end of the training batch in which that step is reached.

    Args:
        metric: Tag of the metric, such as ``val/acc``.
        values: Published values after ``every_n_steps`` optimizer steps, after twice as many, and so on.
        every_n_steps: Number of optimizer steps between two values. For one value an epoch, the steps of an epoch.

    Raises:
        ValueError: If ``values`` is empty, a value is not a finite number, or ``every_n_steps`` is not an integer of at
            least 1.

    Example:
        >>> curve = PublishedCurve("val/acc", values=[0.9171, 0.9364, 0.9468], every_n_steps=500)
        >>> trainer = lightning.Trainer(callbacks=[curve])
    """

    def __init__(self, metric: str, values: Sequence[float], every_n_steps: int) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        if not len(values):
            raise ValueError(f"values={values!r} is not possible: give at least one published value.")
        for index, value in enumerate(values):
            check_number(f"values[{index}]", value)
        self.metric = metric
        self.values = list(values)
        self.every_n_steps = every_n_steps
        self._logged = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step_count(trainer).start(trainer)
        self._logged = steps_taken(trainer) // self.every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With several optimizers, a batch may step over a value's step.
        reached = min(steps_taken(trainer) // self.every_n_steps, len(self.values))
        for index in range(self._logged, reached):
            for logger in trainer.loggers:
                logger.log_metrics({f"published/{self.metric}": self.values[index]}, (index + 1) * self.every_n_steps)
        self._logged = max(self._logged, reached)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        step_count(trainer).stop(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        step_count(trainer).stop(trainer)
