import fcntl
import os
import pty
import re
import struct
import termios
import time

import pytest
import torch
from omegaconf import OmegaConf

from bnlightning.experiments.workers import Workers, available_cores

from .commands import SHORT, assert_same_results, start


def write_threads(path):
    path.write_text(f"{os.getpid()} {torch.get_num_threads()}")


def fail_or_write(path):
    if path.name == "0":
        raise SystemExit("the first")
    # Not before the first has failed, or the second would take the others' turns.
    time.sleep(2)
    path.touch()


def test_no_more_cores_than_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


@pytest.mark.slow
def test_calls_are_made_in_other_processes_on_one_thread_each(tmp_path):
    workers = Workers(2)
    for number in range(3):
        workers.submit(write_threads, tmp_path / str(number))
    workers.wait()
    found = [path.read_text().split() for path in tmp_path.iterdir()]
    assert len(found) == 3 and {threads for _, threads in found} == {"1"}
    assert str(os.getpid()) not in {process for process, _ in found}


@pytest.mark.slow
def test_what_a_call_raises_is_raised_and_what_has_not_begun_is_left_out(tmp_path):
    workers = Workers(1)
    for number in range(8):
        workers.submit(fail_or_write, tmp_path / str(number))
    with pytest.raises(SystemExit, match="the first"):
        workers.wait()
    # Python hands out a few calls more than can be made at once.
    assert {path.name for path in tmp_path.iterdir()} <= {"1", "2", "3"}


@pytest.mark.slow
def test_parallel_runs_give_what_they_give_one_after_the_other(run_module, tmp_path):
    sweep = ("model.norm=none,custom", "seed=1,2", *SHORT)
    one = run_module("bnlightning.train", *sweep, "output_dir=one")
    two = run_module("bnlightning.train", *sweep, "output_dir=two", "n_jobs=2")
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stderr == two.stderr == ""
    names = [f"{norm}_seed-{seed}" for norm in ("none", "custom") for seed in (1, 2)]
    words = [f"{norm}, seed {seed}" for norm in ("no norm", "batch norm (ours)") for seed in (1, 2)]
    assert one.stdout.splitlines()[:4] == [f"Training {run} on 1 thread" for run in words]
    assert sorted(two.stdout.splitlines()[:4]) == sorted(one.stdout.splitlines()[:4])
    files = []
    for directory in (tmp_path / "one", tmp_path / "two"):
        paths = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
        files.append(sorted(re.sub(r"tfevents.*?(\.comparison)?$", r"tfevents\1", path) for path in paths))
    assert files[0] == files[1]
    for name in names:
        assert_same_results(tmp_path / "one" / name, tmp_path / "two" / name)
        recorded = OmegaConf.load(tmp_path / "two" / name / ".hydra" / "hydra.yaml").hydra.runtime.output_dir
        assert recorded == str(tmp_path / "two" / name)
    # Where each run was: two processes, and neither the one that waits.
    processes = {path.name.split(".")[-2] for path in (tmp_path / "two").glob("*_seed-*/events.out.tfevents.*")}
    (comparison,) = (tmp_path / "two").glob("comparison/*.comparison")
    assert len(processes) == 2 and comparison.name.split(".")[-3] not in processes


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_only_a_single_run_shows_a_progress_bar(n_jobs, tmp_path):
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))
    process = start(
        tmp_path, "seed=1,2", "trainer.max_steps=100", f"n_jobs={n_jobs}", stdout=terminal, stderr=terminal, text=False
    )
    os.close(terminal)
    output = b""
    # On Linux the end of a terminal's output is an error.
    with pytest.raises(OSError):
        while True:
            output += os.read(master, 4096)
    os.close(master)
    assert process.wait() == 0
    assert output.count(b"Training batch norm (ours), seed ") == 2
    assert (b"it/s" in output) == (n_jobs == 1)
