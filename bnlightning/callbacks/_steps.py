"""How many steps were taken, the place of values on the x-axis, and which evaluations a callback looks at."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from bnlightning.callbacks._packages import of_lightning, of_this_package
from bnlightning.monitors.counting.ranks import reduce_minima


def logged_step(trainer: lightning.Trainer) -> int:
    """The step at which Lightning logs what ``training_step`` logs now: the number of batches that stepped before.

    It counts batches and not optimizer steps, since there may be several optimizers. It goes on after a resume.
    """
    # Private, but it is what self.log uses, and there is no public way to ask for it.
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


def step_count(trainer: lightning.Trainer) -> "StepCount":
    """The one count of a Trainer's optimizer steps, which all callbacks of this package share."""
    # Kept with the Trainer, whose global_step it completes.
    held = vars(trainer)
    count: StepCount = held.get("_bnlightning_steps") or held.setdefault("_bnlightning_steps", StepCount())
    return count


def steps_taken(trainer: lightning.Trainer) -> int:
    """The number of optimizer steps taken so far: what the package calls a step.

    It is ``trainer.global_step``, and further the steps that Lightning does not count. Those are taken under manual
    optimisation by the optimizers themselves: ``self.optimizers(use_pl_optimizer=False)``, or an optimizer that
    ``configure_optimizers`` does not return.
    """
    return step_count(trainer).taken(trainer)


class StepCount:
    """Counts the optimizer steps of a Trainer, those that Lightning does not count among them."""

    def __init__(self) -> None:
        self.uncounted = 0
        self._seen = self._began_at = 0
        self._handle: RemovableHandle | None = None

    def start(self, trainer: lightning.Trainer, uncounted: int | None = None) -> None:
        """Start a fit. Further calls within the fit change nothing.

        Args:
            trainer: The Trainer, whose module and optimizers are there.
            uncounted: :attr:`uncounted` of the checkpoint that the fit goes on from. ``None``: there is none.
        """
        if uncounted is not None:
            self.uncounted = uncounted
        if self._handle is not None or trainer.lightning_module.automatic_optimization:
            return
        self._seen, self._began_at = 0, trainer.global_step
        is_training = training_optimizers(trainer)

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._seen += is_training(optimizer)

        self._handle = register_optimizer_step_post_hook(count)

    def stop(self, trainer: lightning.Trainer) -> None:
        """End a fit."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self.uncounted = self.state(trainer)
            self._seen = self._began_at = 0

    def taken(self, trainer: lightning.Trainer) -> int:
        """The number of optimizer steps taken so far."""
        # Neither alone: Lightning does not see raw optimizers, and fp16 skips steps that Lightning counts.
        return self._began_at + self.uncounted + max(self._seen, trainer.global_step - self._began_at)

    def state(self, trainer: lightning.Trainer) -> int:
        """The number of steps that Lightning does not count, for a checkpoint."""
        return self.taken(trainer) - trainer.global_step

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer that is copied in the middle of a fit brings a copy of this along. It has no part in that fit.
        return vars(self) | {"_handle": None}


def training_optimizers(trainer: lightning.Trainer) -> Callable[[Optimizer], bool]:
    """Return whether a step of an optimizer is a step of the training: a function of any optimizer of the process.

    The Trainer's optimizers count, and what an optimizer of the Trainer wraps takes no step of its own. If the Trainer
    has none for the module's parameters, every optimizer with one of these parameters counts.
    """
    parameters = {id(parameter) for parameter in trainer.lightning_module.parameters()}

    def has(optimizer: Optimizer) -> bool:
        return any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"])

    # Without any from the module, Lightning's strategy holds one that does nothing.
    known = [optimizer for optimizer in trainer.optimizers if has(optimizer)]
    return (lambda optimizer: any(optimizer is one for one in known)) if known else has


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

    Whether an evaluation is the final one is often known only when the fit ends: the data may have no length, and a
    callback may stop the training. An evaluation that may be the final one is therefore looked at, and kept aside. It
    counts if the fit ends without a further one. An evaluation outside of a fit, by ``trainer.validate``, is always
    due.

    Args:
        every: Least distance between two due evaluations within a fit, in optimizer steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: int | None = None
        self._aside: int | None = None
        self._began: tuple[int, int] = (0, 0)

    @property
    def last(self) -> int | None:
        """The step of the last evaluation that was due."""
        return self._last

    @property
    def is_aside(self) -> bool:
        """Whether the evaluation that began last is kept aside."""
        return self._aside is not None

    def resume(self, last: int | None) -> None:
        """Go on from a checkpoint, whose last due evaluation was at step ``last``."""
        self._last = last

    def start(self, trainer: lightning.Trainer, *, anew: bool = True) -> None:
        """Start a fit.

        Args:
            trainer: The Trainer, at the step at which the fit starts.
            anew: Whether no earlier fit goes on. Earlier evaluations then count only if they were at this very step.
        """
        step = steps_taken(trainer)
        if anew and self._last != step:
            self._last = None
        self._aside = None
        self._began = step, logged_step(trainer)

    def is_looked_at(self, trainer: lightning.Trainer) -> bool:
        """Whether to look at the evaluation that begins: it is due, or it may be the final one.

        :attr:`is_aside` then tells which. A sanity check is not looked at.
        """
        step, last = steps_taken(trainer), self._last
        self._aside = None
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit" or last is None or step - last >= self.every:
            self._last = step
            return True
        if step > last and self._may_be_final(trainer, step):
            self._aside = step
        return self.is_aside

    def ends_with_aside(self, device: torch.device) -> bool:
        """End a fit: whether the evaluation kept aside turns out to be the final one, and so to be due.

        Every rank must call it. A stop that only some of the ranks foresaw makes it ``False``.

        Args:
            device: The device of the collective.
        """
        aside, self._aside = self._aside, None
        step = -1 if aside is None else aside
        (bounds,) = reduce_minima([torch.tensor([step, -step], device=device)])
        first, last = bounds.tolist()
        if first < 0 or first != -last:
            return False
        self._last = first
        return True

    def _may_be_final(self, trainer: lightning.Trainer, step: int) -> bool:
        if _may_stop(trainer):
            return True
        batches = _batches_to_next(trainer)
        if batches is None:
            return True
        if trainer.max_steps == -1:
            return False
        began_at, began_batch = self._began
        # Twice as many as they were on average: under manual optimisation, batches differ.
        steps_a_batch = 2 * (step - began_at) / max(logged_step(trainer) + 1 - began_batch, 1)
        return trainer.global_step + batches * steps_a_batch > trainer.max_steps


# Hooks behind the last training batch before an evaluation, and one that ends an epoch.
_STOPPING_HOOKS = (
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_batch_start",
)
# Lightning's own that stop a training, or call functions of a user.
_STOPPING_CALLBACKS = {"EarlyStopping", "Timer", "LambdaCallback"}


def _may_stop(trainer: lightning.Trainer) -> bool:
    """Whether a callback or the module may end the fit before its time, behind the evaluation that begins."""
    return trainer.should_stop or any(map(_is_stopping, [*trainer.callbacks, trainer.lightning_module]))  # type: ignore[attr-defined]


def _is_stopping(owner: Any) -> bool:
    if getattr(owner, "stop_on_nonfinite", False) or not _STOPPING_CALLBACKS.isdisjoint(
        base.__name__ for base in type(owner).__mro__
    ):
        return True
    hooks = [getattr(owner, name) for name in _STOPPING_HOOKS if hasattr(owner, name)]
    return not all(of_lightning(hook) or of_this_package(hook) for hook in hooks)


def _batches_to_next(trainer: lightning.Trainer) -> int | None:
    """The number of training batches before the next evaluation, at most. ``None``: there may be no further one."""
    every, length, total = trainer.val_check_batch, trainer.num_training_batches, trainer.max_epochs
    number, epochs = trainer.current_epoch + 1, trainer.check_val_every_n_epoch
    if every is None or length == float("inf") or total is None:
        return None
    done = trainer.fit_loop.batch_idx + 1
    if epochs is None:
        left = float("inf") if total == -1 else (total - number) * length + length - done
        return int(every) if every <= left else None
    if done + every <= length:
        return int(every)
    following = (number // epochs + 1) * epochs
    if total != -1 and following > total:
        return None
    return int(length - done + (following - number - 1) * length + min(every, length))
