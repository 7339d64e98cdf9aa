import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import read_events, scalar
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf

from bnlightning.compare.runs import read_run
from bnlightning.experiments.ranks import Ranks, agree, ranks_to_start


def trainer_of(strategy, world_size, num_nodes=1):
    """As much of a Trainer as decides which processes there will be."""
    return SimpleNamespace(world_size=world_size, strategy=strategy, num_devices=world_size, num_nodes=num_nodes)


def ddp(*, started=False):
    environment = LightningEnvironment()
    if started:
        environment = TorchElasticEnvironment()
    return DDPStrategy(accelerator="cpu", cluster_environment=environment)


def test_a_run_in_this_process_starts_no_ranks():
    assert ranks_to_start(trainer_of(SingleDeviceStrategy(), 1), None, in_parallel=True) is None
    assert ranks_to_start(trainer_of(ddp(), 1), None, in_parallel=True) is None
    # Those of before are all that there will be.
    assert ranks_to_start(trainer_of(ddp(), 2), SimpleNamespace(world_size=2), in_parallel=False) is None


@pytest.mark.parametrize(
    ("trainer", "ranks", "in_parallel", "message"),
    [
        (trainer_of(ddp(), 2), SimpleNamespace(world_size=3), False, r"^trainer\.devices=2 .* in 3 processes: give as"),
        (trainer_of(ddp(started=True), 2), None, False, r"^2 processes that something else has started .*TorchElastic"),
        (trainer_of(ddp(), 2), None, True, r"^n_jobs above 1 is not possible with 2 devices a run: give n_jobs=1"),
        (trainer_of(ddp(), 4, num_nodes=2), None, False, r"^trainer\.num_nodes=2 is not possible with one command"),
    ],
)
def test_processes_that_cannot_be_started_here_are_refused(trainer, ranks, in_parallel, message):
    with pytest.raises(ValueError, match=message):
        ranks_to_start(trainer, ranks, in_parallel)


def settings_of(job):
    return OmegaConf.create({"job": {"num": job}, "sweep": {"subdir": f"run-{job}"}})


def do_jobs(rank, port, errors, directory):
    """Write down what one of two processes makes of its jobs, one for each pair of errors."""
    ranks = Ranks("127.0.0.1", port, rank, 2, serves=rank == 0)
    outcomes = []
    for job, both in enumerate(errors):
        ranks.begin(job)
        try:
            error = agree(ranks, settings_of(job), both[rank], lambda: None)
        except SystemExit as refused:
            error = refused
        outcomes.append(None if error is None else (type(error).__name__, str(error)))
    ranks.close()
    torch.save(outcomes, directory / f"{rank}.pt")


@pytest.mark.slow
def test_all_ranks_leave_what_one_fails_in_and_rank_0_tells_it(tmp_path, free_port):
    errors = [(None, None), (None, RuntimeError("mine")), (RuntimeError("own"), None), (None, None)]
    errors += [(None, ValueError("depth=0 is not possible"))]
    # With no process group of their own, which a failure would break.
    torch.multiprocessing.spawn(do_jobs, (free_port, errors, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == [
        None,
        ("RuntimeError", "rank 1 has failed (RuntimeError: mine)"),
        ("RuntimeError", "own"),
        None,
        ("ValueError", "depth=0 is not possible"),
    ]
    # The exit status of a rank other than 0 is never that of the command.
    assert second == [None, None, None, None, ("SystemExit", "0")]


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives_and_write_the_same_files(run_module, tmp_path):
    short = (
        "+experiment=tanh",
        "model.norm=none",
        "trainer.max_steps=5",
        "callbacks.activation_monitor.every_n_steps=5",
    )
    one = run_module("bnlightning.train", *short, "output_dir=one")
    two = run_module(
        "bnlightning.train", *short, "trainer.devices=2", "trainer=ddp_cpu", "data.batch_size=5", "output_dir=two"
    )
    assert one.returncode == two.returncode == 0, two.stderr
    files = []
    for name in ("one", "two"):
        paths = (path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file())
        files.append(sorted(re.sub(r"tfevents.*?(\.comparison)?$", r"tfevents\1", str(path)) for path in paths))
    assert files[0] == files[1]
    single, both = (read_events(tmp_path / name / "none") for name in ("one", "two"))
    assert single.Tags() == both.Tags()
    for tag in single.Tags()["scalars"]:
        first, second = scalar(single, tag), scalar(both, tag)
        assert list(first) == list(second)
        assert list(first.values()) == pytest.approx(list(second.values()), rel=2e-3, abs=2e-4), tag
    # Before the first step nothing has been rounded differently: the counts are equal to the last one.
    for tag in single.Tags()["histograms"]:
        first, second = (events.Histograms(tag)[0] for events in (single, both))
        assert first.histogram_value.bucket == second.histogram_value.bucket, tag
    points = [read_run(tmp_path / name / "none", tmp_path).predictions[0][1] for name in ("one", "two")]
    np.testing.assert_allclose(*(rows[np.lexsort(rows.T)] for rows in points), rtol=1e-4, atol=1e-4)
