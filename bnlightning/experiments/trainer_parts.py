"""What the Trainer of a run is made with: its checkpoint files, its logger, a callback that knows its progress."""

import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from bnlightning.experiments import faults
from bnlightning.experiments.signals import Signals
from bnlightning.writing.summaries import Summaries
from bnlightning.writing.writers import write_to_summary_writer

DESCRIPTIONS = {
    "train/loss": "The loss of one batch, before the step that it leads to: the mean over the samples of all ranks. "
    "The x-axis counts optimizer steps from 0. Healthy: it falls, with some noise. NaN or infinity: the run "
    "has diverged.",
    "val/loss": "The loss over the whole validation set: the mean over the samples of all ranks. The x-axis is the "
    "number of optimizer steps before the evaluation. Healthy: it falls as train/loss does. It rises while train/loss "
    "falls: the network overfits.",
    "val/acc": "The share of right answers over the whole validation set, over the samples of all ranks. The x-axis is "
    "the number of optimizer steps before the evaluation. Healthy: it rises towards 1. Guessing gives 1 divided by the "
    "number of classes.",
    "test/loss": "The loss over the whole test set, once, after the last optimizer step: the mean over the samples of "
    "all ranks. Healthy: close to the last val/loss.",
    "test/acc": "The share of right answers over the whole test set, once, after the last optimizer step, over the "
    "samples of all ranks. Healthy: close to the last val/acc.",
    "test/*": "A number that the module's test measures once, after the last optimizer step, over the samples of one "
    "batch. Healthy: close to the published number, if one is logged under published/.",
    "published/*": "What somebody else has measured, for comparison: no result of this run. The x-axis is the number "
    "of optimizer steps after which it holds.",
}
"""What a tag is over and what is healthy, by the tag or by a pattern of tags: the first that fits is the tag's."""


def _to_cpu(storage: Any, location: str) -> Any:
    return storage


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each of which is there whole or not at all, wherever temporary files are kept.

    Args:
        trusted: Whether a checkpoint that is read may run code of its own.
    """

    def __init__(self, trusted: bool = False) -> None:
        super().__init__()
        self.trusted = trusted

    def load_checkpoint(self, path: Any, map_location: Any = _to_cpu, weights_only: bool | None = None) -> Any:
        """Read nothing but data, unless the checkpoint is trusted."""
        if not os.path.exists(path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        return torch.load(path, map_location=map_location, weights_only=not self.trusted)

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
    """Lightning's TensorBoard logger for a whole run: what it evaluates before and after its fit is in the same file.

    Numbers that are logged together are one event. The first event of a tag has its description.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tags: set[str] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers at a step, but for Lightning's ``epoch``: it would be the first chart that a person sees.

        A mapping is written as Lightning writes it: as several curves.
        """
        numbers = {}
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                curves: Any = {name: value}
                super().log_metrics(curves, step)
            elif name != "epoch":
                tag = f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}" if self._prefix else name
                numbers[tag] = _number(tag, value)
        self._tags |= numbers.keys()
        write_to_summary_writer(self.experiment, Summaries(step or 0, numbers, describe=_describe))

    @rank_zero_only
    def log_outcome(self, given: Mapping[str, Any]) -> None:
        """Put the run into TensorBoard's HParams tab: what it was given, and its last ``val/`` and ``test/`` numbers.

        Args:
            given: Values by the keys of the configuration; what is neither a number nor a text is written as text.
        """
        from torch.utils.tensorboard.summary import hparams

        values = {key: _plain(value) for key, value in given.items()}
        # The tab takes the last value of each of these tags: they are not written again.
        results = dict.fromkeys(sorted(tag for tag in self._tags if tag.startswith(("val/", "test/"))))
        for summary in hparams(values, results):  # type: ignore[no-untyped-call, unused-ignore]
            self.experiment._get_file_writer().add_summary(summary)
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory, and leave the file open."""
        # What failed may be that nothing can be written; Lightning has more to put in order then.
        with suppress(OSError) if status == "failed" else nullcontext():
            self.experiment.flush()
            self.save()


def _describe(tag: str) -> str | None:
    return next((text for pattern, text in DESCRIPTIONS.items() if fnmatchcase(tag, pattern)), None)


def _number(tag: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(faults.cannot_be_logged(tag, value)) from error


def _plain(value: Any) -> float | str:
    """A number, or a text as it is typed on the command line."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Progress(lightning.Callback):
    """How far a run has come.

    Args:
        signals: Those of the command: a batch does not begin after one that ends it.

    Attributes:
        has_begun: Whether a batch has been taken, for whatever purpose.
        evaluated_at: The number of optimizer steps before the last evaluation; ``None`` without one.
    """

    def __init__(self, signals: Signals) -> None:
        self.has_begun = False
        self.evaluated_at: int | None = None
        self._signals = signals

    def on_validation_batch_start(self, *_: Any) -> None:
        """A batch to evaluate."""
        self._begin()

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch to train with."""
        self._begin()

    def on_test_batch_start(self, *_: Any) -> None:
        """A batch of the test."""
        self._begin()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """An evaluation is over."""
        self.evaluated_at = trainer.global_step

    def _begin(self) -> None:
        self.has_begun = True
        self._signals.check()
