import os
import signal

import pytest
from helpers import read_events, scalar, wait_for_files

from .commands import start


@pytest.mark.slow
def test_an_interrupted_sweep_says_where_the_finished_runs_are(tmp_path):
    process = start(tmp_path, "+experiment=tanh", "trainer.max_steps=1500", "output_dir=out")
    assert process.stdout.readline() == "Training custom on 1 thread\n"
    assert process.stdout.readline() == "Training none on 1 thread\n"
    # The line comes just before the run begins to write.
    wait_for_files(process, tmp_path, "out/none/events.out.tfevents.*")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors
    assert f"Stopped. What was trained so far: python -m bnlightning.compare {tmp_path / 'out'}" in errors
    assert (tmp_path / "out" / "custom" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_parallel_runs_all_stop(signum, tmp_path):
    process = start(
        tmp_path, "seed=1,2,3", "n_jobs=2", "trainer.max_steps=100000", "output_dir=out", start_new_session=True
    )
    # In the midst of training: an epoch is over.
    wait_for_files(process, tmp_path, "out/*/checkpoints/last.ckpt", 2)
    # To all, as a terminal does, or to the one that a cluster may know.
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and sorted(output.splitlines()) == [
        "Training custom_seed-1 on 1 thread",
        "Training custom_seed-2 on 1 thread",
    ]
    assert [line for line in errors.splitlines() if not line.startswith("Stopped by SIGTERM after step")] == [
        f"Stopped. What was trained so far: python -m bnlightning.compare {tmp_path / 'out'}",
        f"To train the rest: the same command with resume=true output_dir={tmp_path / 'out'}",
    ]
    assert not list(tmp_path.glob("out/*/finished"))
    # What they had in memory is written.
    assert all(scalar(read_events(path.parent), "train/loss") for path in tmp_path.glob("out/*/events.out.tfevents.*"))


@pytest.mark.slow
def test_sigterm_before_the_first_run_leaves_nothing(tmp_path):
    process = start(tmp_path, "n_jobs=2", "seed=1,2", "output_dir=out")
    wait_for_files(process, tmp_path, "out/multirun.yaml")
    process.terminate()
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 1
    assert not list(tmp_path.iterdir())
