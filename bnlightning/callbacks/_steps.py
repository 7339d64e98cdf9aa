"""Which steps and evaluations a callback looks at."""

import lightning


def logged_step(trainer: lightning.Trainer) -> int:
    """Where Lightning's own loggers put what ``training_step`` logs now: the number of batches that stepped before.

    It counts batches and not steps of optimizers, of which there may be several, and it goes on after a resume.
    """
    # Private, and what self.log uses; there is no public way to ask for it.
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


class StepAxis:
    """Where values stand on the x-axis: as Lightning's loggers have it, and evaluations at what was trained so far."""

    def __init__(self) -> None:
        self.batch = 0
        self._global_step: int | None = None

    def start_batch(self, trainer: lightning.Trainer) -> None:
        """A training batch begins: ``batch`` is where what it logs stands."""
        self.batch, self._global_step = logged_step(trainer), trainer.global_step

    def evaluation(self, trainer: lightning.Trainer) -> int:
        """Where an evaluation stands that begins now: the number of batches that stepped.

        Within a fit Lightning has not counted the last one yet, and puts its own one before.
        """
        if self._global_step is None or trainer.state.fn != "fit":
            return logged_step(trainer)
        module = trainer.lightning_module
        return self.batch + (trainer.global_step > self._global_step or not module.automatic_optimization)


class EvaluationCadence:
    """Evaluations at least ``every`` optimizer steps after the last one that was due, and those of the final weights.

    One of its own (``trainer.validate``) is always due, unless the last one was of the same step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: int | None = None

    @property
    def last(self) -> int | None:
        """The step of the last evaluation that was due."""
        return self._last

    def resume(self, last: int | None) -> None:
        """Go on after a checkpoint, in which the last that was due is ``last``."""
        self._last = last

    def start(self, step: int) -> None:
        """A fit starts at ``step``; an evaluation before it, of these weights, is the only one that counts."""
        if self._last != step:
            self._last = None

    def is_due(self, trainer: lightning.Trainer) -> bool:
        """Whether the evaluation that begins is due; a sanity check never is."""
        step, last = trainer.global_step, self._last
        if trainer.sanity_checking:
            return False
        within_fit = trainer.state.fn == "fit"
        if within_fit and last is not None and step - last < self.every and not _is_final(trainer, last):
            return False
        self._last = step
        return True


def _is_final(trainer: lightning.Trainer, last: int) -> bool:
    step = trainer.global_step
    return step > last and step >= trainer.estimated_stepping_batches
