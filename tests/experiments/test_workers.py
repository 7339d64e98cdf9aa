import os
import time

import pytest
import torch

from bnlightning.experiments.workers import Workers, available_cores


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
