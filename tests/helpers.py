from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing import event_accumulator


def quiet_trainer(directory: Path | None = None, **options: Any) -> lightning.Trainer:
    """A Trainer on one CPU that prints nothing and writes TensorBoard files into ``directory``, or nothing at all."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(directory, name="", version="") if directory is not None else False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(**(defaults | options))


def read_events(directory: Path) -> event_accumulator.EventAccumulator:
    """Everything in the event files of ``directory``."""
    accumulator = event_accumulator.EventAccumulator(
        str(directory), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0, "images": 0}
    )
    accumulator.Reload()
    return accumulator


def scalar(events: event_accumulator.EventAccumulator, tag: str) -> dict[int, float]:
    """The values of a tag by step."""
    return {item.step: item.value for item in events.Scalars(tag)}
