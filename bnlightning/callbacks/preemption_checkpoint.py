"""A callback that saves a checkpoint when the machine is about to be taken away."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bnlightning.callbacks._packages import BothPackages
from bnlightning.callbacks._steps import step_count, steps_taken
from bnlightning.monitors.counting.ranks import reduce_maxima, world_size

# The time between two exchanges of the ranks, and the most steps between them.
_SECONDS = 1.0
_MAX_STEPS = 1000


class PreemptionCheckpoint(BothPackages, Checkpoint):
    """Save a checkpoint on SIGTERM and end the training after the same step on all ranks.

    Clusters send SIGTERM to one process or to all, some seconds before they take a machine away. Lightning's own answer
    saves nothing. It also communicates within the signal's handler, where the ranks are at different places.

    Here the handler only sets a flag. The ranks exchange their flags about once a second, in one small collective. If
    any rank got the signal, all ranks save after the same optimizer step. They then raise Lightning's
    ``SIGTERMException``, which ends the program.

    A signal during an evaluation of a fit takes effect after the next step. In ``validate`` and ``test`` a single
    process ends at the next batch, and several ranks end after the evaluation.

    A Trainer with this callback does not add a ``ModelCheckpoint`` by itself, as with Lightning's
    ``OnExceptionCheckpoint``. Add a ``ModelCheckpoint`` if the training shall save checkpoints without a signal.

    Args:
        path: Path of the checkpoint's file, relative to the working directory.

    Raises:
        ValueError: If ``path`` is not the path of a file.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[PreemptionCheckpoint("preempted.ckpt")])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ValueError(f"path={path!r} is not possible: give the path of a file.")
        self.path = Path(path)
        self._requested = self._stops = False
        self._step = 0
        self._steps_left = self._steps_asked = 1
        self._asked_at = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Not earlier, because Lightning installs its own handler just before this hook. At the end of the fit Lightning
        # restores the handler that was there before.
        self._listen()
        step_count(trainer).start(trainer)
        self._step = steps_taken(trainer)
        self._steps_left = self._steps_asked = 1
        self._asked_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Gradients that accumulate between two optimizer steps are in no checkpoint.
        step = steps_taken(trainer)
        if step == self._step:
            return
        self._step = step
        self._steps_left -= 1
        if self._steps_left > 0 or not self._ask(trainer.strategy.root_device):
            return
        trainer.save_checkpoint(self.path)
        self._stops = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # By now the values that the last step logged are written, and so is its evaluation if one was due.
        if self._stops:
            self._stop(trainer, f"after step {self._step}: {self.path}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # The signal may have come after the ranks' last exchange.
        if not self._stops and self._ask(trainer.strategy.root_device):
            trainer.save_checkpoint(self.path)
            self._stops = True
        if self._stops:
            self._stop(trainer, f"after step {steps_taken(trainer)}: {self.path}")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._listen()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._listen()

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._leave_evaluation(trainer)

    def on_test_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        self._leave_evaluation(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        step_count(trainer).stop(trainer)
        # A rank without anything to evaluate gets no other hook.
        if stage in ("validate", "test") and self._ask(trainer.strategy.root_device):
            self._stop(trainer, "in an evaluation")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        step_count(trainer).stop(trainer)

    def _leave_evaluation(self, trainer: lightning.Trainer) -> None:
        # Several ranks may have different numbers of batches, so they end in teardown.
        if self._requested and world_size() == 1:
            self._stop(trainer, "in an evaluation")

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._request)

    def _stop(self, trainer: lightning.Trainer, where: str) -> NoReturn:
        self._requested = self._stops = False
        if trainer.is_global_zero:
            print(f"Stopped by SIGTERM {where}", file=sys.stderr, flush=True)
        raise SIGTERMException

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self._requested = True

    def _ask(self, device: torch.device) -> bool:
        """Return whether any rank got the signal, and agree on the number of steps until the next exchange."""
        if world_size() == 1:
            return self._requested
        per_step = (time.monotonic() - self._asked_at) / self._steps_asked
        steps = max(1, min(_MAX_STEPS, int(_SECONDS / max(per_step, 1e-6))))
        # The maximum of negative numbers: the fewest steps that any rank proposes.
        (agreed,) = reduce_maxima([torch.tensor([self._requested, -steps], device=device, dtype=torch.int64)])
        requested, proposal = agreed.tolist()
        self._steps_left = self._steps_asked = -proposal
        self._asked_at = time.monotonic()
        return bool(requested)
