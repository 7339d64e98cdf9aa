import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.multiprocessing as mp
from lightning.pytorch.loggers import Logger, TensorBoardLogger
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


class MemoryLogger(Logger):
    """Keeps every scalar by tag and step."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[tuple[str, int | None], float] = {}

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars |= {(tag, step): value for tag, value in metrics.items()}


def p_value(one: Sequence[float], two: Sequence[float]) -> float:
    """Of a two-sided Mann-Whitney U test. What is not finite ranks as infinity; the fifth decimal is the last one."""
    # Takes a second, which ranks that are started from a test's file do not have to spend.
    from scipy.stats import mannwhitneyu

    a, b = (np.round(np.where(np.isfinite(values), values, np.inf), 5) for values in (one, two))
    if len(np.unique(np.concatenate([a, b]))) == 1:
        return 1.0
    return float(mannwhitneyu(a, b, alternative="two-sided").pvalue)


def run_on_ranks(
    function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any, backend: str = "gloo"
) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each of several ranks: joined processes of their own."""
    mp.spawn(_run_on_rank, (world_size, directory, backend, function, arguments), nprocs=world_size)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_on_lightning_ranks(
    function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any
) -> list[Any]:
    """As :func:`run_on_ranks`, but it is Lightning's strategies that join the ranks: ``Trainer(strategy="ddp")``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run_on_lightning_rank, (world_size, port, directory, function, arguments), nprocs=world_size)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_on_lightning_rank(
    rank: int, world_size: int, port: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.save(function(rank, *arguments), directory / f"{rank}.pt")
    # Its threads, left running, may abort the process at its end.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _run_on_rank(
    rank: int,
    world_size: int,
    directory: Path,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory / 'store'}"
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), directory / f"{rank}.pt")
    # The store must not go with the first to finish.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def write_mnist(
    directory: Path, dataset: str = "MNIST", num_train: int = 300, num_test: int = 100
) -> dict[str, np.ndarray]:
    """The four files of a small data set as MNIST's, which a classifier learns in a few steps; returns their arrays.

    Class ``k`` has a bright patch at the ``k``-th of ten places; the first two pixels count the images of a file.
    """
    raw = directory / dataset / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("t10k", num_test)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = 4 + 12 * (label // 5), 1 + 5 * (label % 5)
            image[row : row + 8, column : column + 5] += 180
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
        arrays[f"{split}-images-idx3-ubyte"], arrays[f"{split}-labels-idx1-ubyte"] = images, labels
    for name, array in arrays.items():
        header = [0x800 + array.ndim, *array.shape]
        (raw / name).write_bytes(b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes())
    return arrays


def python_blocks(markdown: str) -> list[str]:
    """The blocks of Python code in a page."""
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


def run_example(code: str, directory: Path) -> None:
    """Run a block of a page in a process of its own, in ``directory``, with a small MNIST there."""
    write_mnist(directory / "data", num_train=5400)
    # With Lightning's usual warnings: a reader sees them, too.
    result = subprocess.run(
        [sys.executable, "-c", f"import torch\ntorch.set_num_threads(1)\n{code}"],
        cwd=directory,
        env={**os.environ, "BNLIGHTNING_DATA_DIR": str(directory / "data")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (".fit(" in code) == bool(list(directory.glob("lightning_logs/version_0/events.out.tfevents.*")))


def wait_for_files(process, directory, pattern, number=1):
    """The files below a directory that a running process makes, as soon as there are so many."""
    while len(found := sorted(directory.glob(pattern))) < number:
        assert process.poll() is None
        time.sleep(0.05)
    return found
