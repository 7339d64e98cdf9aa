"""A checkpoint when the machine is about to be taken away."""

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

from bnlightning.monitors.counting.ranks import reduce_maxima, world_size

# How often the ranks ask each other whether one of them was told to end.
_SECONDS = 1.0
_MAX_STEPS = 1000


class PreemptionCheckpoint(Checkpoint):
    """On SIGTERM ends training after the same step on all ranks, with a checkpoint to resume from.

    Clusters send SIGTERM, to one process or to all, some seconds before they take a machine away. Lightning's answer
    saves nothing, and communicates from within the signal's handler, where the ranks are at different places. Here
    the handler sets a flag; the ranks exchange their flags about once a second, in one small collective, and whichever
    rank got the signal, all of them save after the same optimizer step and raise Lightning's ``SIGTERMException``,
    which ends the program. A signal amid an evaluation within a fit counts after the next step; in ``validate`` and
    ``test`` it ends the program with the next batch or, with several ranks, with the evaluation.

    As with Lightning's ``OnExceptionCheckpoint``, a Trainer that has this callback makes no ``ModelCheckpoint`` by
    itself: give one, too, if the training is to leave checkpoints without a signal.

    Args:
        path: The checkpoint's file. Relative to the working directory.

    Raises:
        ValueError: If ``path`` is not the path of a file.
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
        # Not earlier: Lightning's handler, which would come in front of this one, is there from here on. It is
        # Lightning, too, that puts back at the end of the fit what was there before.
        self._listen()
        self._step = trainer.global_step
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
        # Between two optimizer steps gradients are accumulated, which no checkpoint holds.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._steps_left -= 1
        if self._steps_left > 0 or not self._ask(trainer.strategy.root_device):
            return
        trainer.save_checkpoint(self.path)
        self._stops = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # What the step before has logged is written by now, and its evaluation, if it was due.
        if self._stops:
            self._stop(trainer, f"after step {self._step}: {self.path}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # The last step, or one since the ranks last asked.
        if not self._stops and self._ask(trainer.strategy.root_device):
            trainer.save_checkpoint(self.path)
            self._stops = True
        if self._stops:
            self._stop(trainer, f"after step {trainer.global_step}: {self.path}")

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
        # A rank that has nothing to evaluate gets no other hook.
        if stage in ("validate", "test") and self._ask(trainer.strategy.root_device):
            self._stop(trainer, "in an evaluation")

    def _leave_evaluation(self, trainer: lightning.Trainer) -> None:
        # Several ranks may have different numbers of batches.
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
        """Whether any rank was told to end; all of them ask again after the same number of steps."""
        if world_size() == 1:
            return self._requested
        per_step = (time.monotonic() - self._asked_at) / self._steps_asked
        steps = max(1, min(_MAX_STEPS, int(_SECONDS / max(per_step, 1e-6))))
        # The fewest steps that any rank proposes.
        (agreed,) = reduce_maxima([torch.tensor([self._requested, -steps], device=device, dtype=torch.int64)])
        requested, proposal = agreed.tolist()
        self._steps_left = self._steps_asked = -proposal
        self._asked_at = time.monotonic()
        return bool(requested)
