import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_mnist


def pytest_xdist_auto_num_workers() -> int:
    # Each takes half a gigabyte, and some tests start processes of their own.
    return min(os.cpu_count() or 1, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # With more, a busy machine with few cores slows networks this small a hundredfold.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = dict(os.environ)
    yield
    # The interpreter's own bookkeeping of what pytest runs, and what Lightning and torch announce to their children.
    ignored = {"PYTEST_CURRENT_TEST", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "OMP_NUM_THREADS"}
    ignored |= {"TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    leaked = {key for key in os.environ.keys() | before.keys() if os.environ.get(key) != before.get(key)} - ignored
    for key in leaked:
        os.environ.pop(key)
    os.environ.update({key: before[key] for key in leaked & before.keys()})
    assert not leaked, f"the test changed the environment: {leaked}"
    assert not torch.distributed.is_initialized(), "the test left a process group"


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """The ``data_dir`` of 300 images for training and 100 for the test in MNIST's format, learnable in a few steps."""
    write_mnist(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m MODULE ARGUMENTS...`` in the test's own directory, as a user would."""

    def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )

    return run
