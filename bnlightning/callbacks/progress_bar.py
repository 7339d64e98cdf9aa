"""A progress bar callback for trainings that evaluate often."""

import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from bnlightning.callbacks._packages import BothPackages


class TrainingProgressBar(BothPackages, TQDMProgressBar):
    """Lightning's progress bar, without bars for the evaluations and only on a terminal.

    The bars of short evaluations would only flash. Output that goes to a file shows no bar at all.

    Args:
        refresh_rate: Number of batches from one update to the next.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[TrainingProgressBar(refresh_rate=10)])
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Disable the bar if the output does not go to a terminal."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def init_validation_tqdm(self) -> Any:
        """Return a bar that shows nothing."""
        return Tqdm(disable=True)
