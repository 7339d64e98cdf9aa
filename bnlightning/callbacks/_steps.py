"""The place of values on the x-axis, and which evaluations a callback looks at."""

import lightning


def logged_step(trainer: lightning.Trainer) -> int:
    """The step at which Lightning logs what ``training_step`` logs now: the number of batches that stepped before.

    It counts batches and not optimizer steps, since there may be several optimizers. It goes on after a resume.
    """
    # Private, but it is what self.log uses, and there is no public way to ask for it.
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


class StepAxis:
    """The x-axis: training values stand where Lightning logs them, evaluations at the number of steps taken so far."""

    def __init__(self) -> None:
        self.batch = 0
        self._global_step: int | None = None

    def start_batch(self, trainer: lightning.Trainer) -> None:
        """Begin a training batch. ``batch`` is then the step of what it logs."""
        self.batch, self._global_step = logged_step(trainer), trainer.global_step

    def evaluation(self, trainer: lightning.Trainer) -> int:
        """The step of an evaluation that begins now: the number of batches that stepped.

        Within a fit, Lightning has not yet counted the last batch, and logs its own values one step earlier.
        """
        if self._global_step is None or trainer.state.fn != "fit":
            return logged_step(trainer)
        module = trainer.lightning_module
        return self.batch + (trainer.global_step > self._global_step or not module.automatic_optimization)


class EvaluationCadence:
    """Says which evaluations are due: one at least ``every`` optimizer steps after the last due one, and the final one.

    An evaluation outside of a fit, by ``trainer.validate``, is always due.

    Args:
        every: Least distance between two due evaluations within a fit, in optimizer steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: int | None = None

    @property
    def last(self) -> int | None:
        """The step of the last evaluation that was due."""
        return self._last

    def resume(self, last: int | None) -> None:
        """Go on from a checkpoint, whose last due evaluation was at step ``last``."""
        self._last = last

    def start(self, step: int) -> None:
        """Start a fit at ``step``. Earlier evaluations count only if they were at this very step."""
        if self._last != step:
            self._last = None

    def is_due(self, trainer: lightning.Trainer) -> bool:
        """Whether the evaluation that begins is due. A ``True`` is remembered. A sanity check is never due."""
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
