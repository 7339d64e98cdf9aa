"""What Lightning's Trainer is given for a run: where its checkpoints and its numbers go."""

import os
from contextlib import nullcontext, suppress
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each of which is there whole or not at all, wherever temporary files are kept."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the file, then rename; somewhere else than in a file system, as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        beside = f"{path}.part"
        try:
            super().save_checkpoint(checkpoint, beside, storage_options)
            os.replace(beside, path)
        finally:
            with suppress(OSError):
                os.unlink(beside)


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, less the closing of its file: what a run evaluates before and after its fit is to
    be in the same one.
    """

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory."""
        # What failed may be that nothing can be written; Lightning has more to put in order then.
        with suppress(OSError) if status == "failed" else nullcontext():
            self.experiment.flush()
            self.save()
