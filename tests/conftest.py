import os
import shutil
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


def pytest_configure() -> None:
    # Of the processes that tests start. With more, a busy machine slows networks this small a hundredfold.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
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


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser, for tests that look at a page as a user would; where there is none, they are skipped.

    In continuous integration, where the variable ``CI`` is ``true``, they fail instead. Who runs as root has to start
    it with ``--no-sandbox``.
    """
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        reason = "no chromium on this machine: install it, for example with apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return Path(found[0])
