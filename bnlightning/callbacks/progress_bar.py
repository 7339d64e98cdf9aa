"""A progress bar for trainings that evaluate often."""

import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class TrainingProgressBar(TQDMProgressBar):
    """Lightning's progress bar without those of the evaluations, which would flash by, and only on a terminal.

    Args:
        refresh_rate: Batches from one update to the next.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Show nothing where the output goes to a file."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def init_validation_tqdm(self) -> Any:
        """No bar."""
        return Tqdm(disable=True)
