"""Which steps and evaluations a callback looks at."""

import lightning


def logged_step(trainer: lightning.Trainer) -> int:
    """Where Lightning's own loggers put what ``training_step`` logs now: the number of batches that stepped before.

    It counts batches and not steps of optimizers, of which there may be several, and it goes on after a resume.
    """
    # Private, and what self.log uses; there is no public way to ask for it.
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


class TrainingCadence:
    """The first step, and those at which the number of optimizer steps has passed another multiple of ``every``."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: int | None = None

    def start(self) -> None:
        """A fit starts."""
        self._last = None

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is due; asked again at the same step, it is not."""
        # Not step % every: with several optimizers the count of steps leaps over multiples.
        if self._last is not None and step // self.every <= self._last // self.every:
            return False
        self._last = step
        return True


class EvaluationCadence:
    """Evaluations at least ``every`` optimizer steps after the last one that was due, and those of the final weights.

    One of its own (``trainer.validate``) is always due, unless the last one was of the same step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: int | None = None

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
