import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import read_events, scalar, wait_for_files
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bnlightning.experiments.signals import Signals, answer_in_worker, call_in_worker

from .commands import start


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_by_an_exception_and_is_remembered(signum):
    signals = Signals()
    signals.check()
    with pytest.raises(KeyboardInterrupt), signals.answered(sigterm=True):
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert signals.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signals.check()


def test_sigterm_is_heard_once():
    with Signals().answered(sigterm=True):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        # While everything is put in order.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def test_what_others_answer_or_ignore_is_left_to_them():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Signals().answered(sigterm=False):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)

    # Only the main thread may ask for signals.
    def answer():
        with Signals().answered(sigterm=True):
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor() as threads:
        assert threads.submit(answer).result() is signal.default_int_handler


def test_a_worker_stops_once_and_begins_nothing_new():
    answer_in_worker()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    done = []

    def replaced(number):
        # As Lightning's callbacks do.
        signal.signal(signal.SIGTERM, lambda *_: None)
        done.append(number)

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    def ends_slowly():
        try:
            stopped()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            done.append("written")

    call_in_worker(replaced, 1)
    call_in_worker(replaced, 2)
    with pytest.raises(SystemExit):
        call_in_worker(ends_slowly)
    call_in_worker(replaced, 3)
    assert done == [1, 2, "written"]


def test_a_worker_stops_where_a_callback_has_answered():
    answer_in_worker()

    def answered():
        raise SIGTERMException

    done = []
    with pytest.raises(SIGTERMException):
        call_in_worker(answered)
    call_in_worker(done.append, 1)
    assert not done


@pytest.mark.slow
def test_an_interrupted_sweep_says_where_the_finished_runs_are(tmp_path):
    process = start(tmp_path, "+experiment=tanh", "trainer.max_steps=1500", "output_dir=out")
    assert process.stdout.readline() == "Training batch norm (ours) on 1 thread\n"
    assert process.stdout.readline() == "Training no norm on 1 thread\n"
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
        "Training batch norm (ours), seed 1 on 1 thread",
        "Training batch norm (ours), seed 2 on 1 thread",
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
