"""The command in several processes, and what becomes of it when they fail."""

import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import read_events, scalar, wait_for_files, write_mnist

from bnlightning import CONF_DIR
from bnlightning._runs import find_runs

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
TRAIN = ("-m", "bnlightning.train")
# Fails on one rank in the first of two runs, by an exception or by being killed.
FAILING = """
import os, signal
from bnlightning import LitRegressor


class Failing(LitRegressor):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        rank = self.trainer.global_rank
        if self.hparams["depth"] == 2 and batch_idx == 5 and rank == int(os.environ["RANK_TO_FAIL"]):
            if "KILL" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no more of this")
"""
FAILING_SWEEP = ("model._target_=mine.Failing", "model.depth=2,3", "trainer=ddp_cpu", "trainer.max_steps=10")


def start(tmp_path, *arguments, **options):
    """Python with these arguments in the background, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)} | options.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def finish(process, seconds=300):
    """The exit status and both outputs, once no process is left that could write."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors


def files(directory):
    """Every file below a directory, without what differs in the names of event files."""
    paths = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(re.sub(r"tfevents.*?(\.comparison)?$", r"tfevents\1", path) for path in paths)


def assert_same_training(first, second):
    """Every number that two runs wrote while training and every weight, bit by bit."""
    one, two = read_events(first), read_events(second)
    assert one.Tags()["scalars"] == two.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        a, b = ([(item.step, item.value) for item in events.Scalars(tag)] for events in (one, two))
        assert str(a) == str(b), tag
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What the sweep below leaves in one process, which takes twice the batches."""
    directory = tmp_path_factory.mktemp("one")
    status, _, errors = finish(start(directory, *TRAIN, *SWEEP, "data.batch_size=20", "output_dir=out"))
    assert (status, errors) == (0, "")
    return directory / "out"


SWEEP = ("+experiment=tanh", "model.norm=none,custom", "model.norm_options.sync=true", "trainer.max_steps=20")
SWEEP += ("callbacks.activation_monitor.every_n_steps=10",)
NODES = (
    "--nnodes=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:{port}",
    "--rdzv-id=bnlightning",
    "--local-addr=127.0.0.1",
)


@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "two nodes", "srun"])
def test_a_sweep_of_several_processes_leaves_what_one_process_leaves(launcher, one_process, tmp_path):
    sweep = [*TRAIN, *SWEEP, "trainer=ddp_cpu", "output_dir=out"]
    if launcher == "lightning":
        started = [start(tmp_path, *sweep, "trainer.devices=2")]
    elif launcher == "torchrun":
        started = [start(tmp_path, *TORCHRUN, "2", *sweep)]
    elif launcher == "srun":
        # What srun sets, of two tasks on one machine.
        job = {"SLURM_JOB_ID": str(random.randint(1, 10**6)), "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
        job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
        tasks = [job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        started = [start(tmp_path, *sweep, environment=task) for task in tasks]
    else:
        nodes = [option.format(port=random.randint(20000, 30000)) for option in NODES]
        sweep += ["trainer.devices=1", "trainer.num_nodes=2"]
        started = [start(tmp_path, *TORCHRUN, "1", *nodes, *sweep) for _ in range(2)]
    results = [finish(process) for process in started]
    assert [status for status, _, _ in results] == [0] * len(started), results
    # One of them says it, once.
    output = "".join(output for _, output, _ in results)
    assert [line for line in output.splitlines() if line.startswith("Training")] == [
        "Training none on 1 thread",
        "Training custom on 1 thread",
    ]
    assert output.count("Look closer: tensorboard") == 1
    assert files(tmp_path / "out") == files(one_process)
    for variant in ("none", "custom"):
        one, two = read_events(one_process / variant), read_events(tmp_path / "out" / variant)
        assert one.Tags() == two.Tags()
        # An evaluation by the batch's statistics takes each rank's own half of the points.
        for tag, tolerance in (("train/loss", 1e-4), ("val/loss", 1e-3)):
            a, b = scalar(one, tag), scalar(two, tag)
            assert list(a) == list(b)
            # The first steps, before chaos multiplies how sums are rounded.
            early = [step for step in a if step <= 2]
            assert [b[step] for step in early] == pytest.approx([a[step] for step in early], rel=tolerance), tag


@pytest.mark.parametrize("on_mnist", [False, True])
def test_every_experiment_runs_in_two_processes(on_mnist, tmp_path):
    names = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml") if path.stem != "mnist_replay")
    paths = {name: (CONF_DIR / "experiment" / f"{name}.yaml").read_text() for name in names}
    names = [name for name in names if ("schedule: epochs" in paths[name]) == on_mnist]
    short = ["trainer.max_steps=5"]
    if on_mnist:
        write_mnist(tmp_path / "data")
        short = ["data.data_dir=data", "data.num_val=100", "data.num_train=200", "data.batch_size=25"]
        short += ["trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
    first, *others = names
    # What one file declares as its sweep goes for all.
    sweep = [f"experiment={','.join(names)}", "hydra.sweeper.params=null", "hydra.callbacks.compare.draw=null"]
    config = tmp_path / "conf" / "several.yaml"
    config.parent.mkdir()
    config.write_text(f"defaults:\n  - train\n  - experiment: {first}\n  - _self_\n")
    status, output, errors = finish(
        start(tmp_path, *TRAIN, "--config-dir=conf", "--config-name=several", *sweep, *short, "trainer=ddp_cpu",
              "output_dir=out")
    )  # fmt: skip
    assert (status, errors) == (0, ""), errors
    runs = find_runs(tmp_path / "out")
    assert len(runs) == len(names) == output.count("Training ")
    for path in runs:
        assert (path / "finished").is_file()
        assert len(list(path.glob("events.out.tfevents.*"))) == 1
    assert others and (tmp_path / "out" / "comparison.png").is_file()


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_failure_on_one_rank_the_others_go_on_with_it(rank, launcher, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    command = TRAIN if launcher == "lightning" else (*TORCHRUN, "2", *TRAIN)
    sweep = (*FAILING_SWEEP, "output_dir=out")
    status, output, errors = finish(start(tmp_path, *command, *sweep, environment={"RANK_TO_FAIL": str(rank)}))
    assert status == 1
    assert f"custom_depth-2: rank {rank} has failed (RuntimeError: no more of this)\n" in errors
    assert errors.count("has failed") <= 2 and 'raise RuntimeError("no more of this")' in errors
    assert "To train the rest: the same command with resume=true" in errors
    lines = output.splitlines()
    assert lines == ["Training custom_depth-2 on 1 thread", "Training custom_depth-3 on 1 thread"]
    assert not (tmp_path / "out" / "custom_depth-2" / "finished").exists()
    # What came after it is what it would have been without.
    alone = tuple(argument for argument in sweep[:-1] if "depth" not in argument)
    status, _, errors = finish(
        start(tmp_path, *TRAIN, *alone, "model.depth=3", "output_dir=alone", environment={"RANK_TO_FAIL": "-1"})
    )
    assert (status, errors) == (0, "")
    assert_same_training(tmp_path / "out" / "custom_depth-3", tmp_path / "alone" / "custom")


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_all_are_gone_within_a_minute(rank, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    process = start(
        tmp_path, *TRAIN, *FAILING_SWEEP, "output_dir=out", environment={"RANK_TO_FAIL": str(rank), "KILL": "1"}
    )
    (written,) = wait_for_files(process, tmp_path, "out/custom_depth-2/events*")
    status, output, errors = finish(process, 60)
    assert status != 0 and output == "Training custom_depth-2 on 1 thread\n"
    assert "another rank's process or its connection has gone" in errors
    assert 0 in scalar(read_events(written.parent), "val/loss")


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_leaves_a_checkpoint_that_resumes_to_the_same_numbers(processes, tmp_path):
    trainer = "trainer=cpu" if processes == 1 else "trainer=ddp_cpu"
    options = ("seed=3", trainer, "data.num_points=2000", "callbacks.activation_monitor.every_n_steps=50")

    def command(steps, *more):
        return start(tmp_path, *TRAIN, *options, f"trainer.max_steps={steps}", *more)

    process = command(100000, "output_dir=part")
    wait_for_files(process, tmp_path, "part/custom/checkpoints/last.ckpt")
    os.kill(process.pid, signal.SIGTERM)
    status, _, errors = finish(process, 60)
    assert status == 1 and "Traceback" not in errors
    stopped = int(re.search(r"^Stopped by SIGTERM after step (\d+): .*last\.ckpt$", errors, re.M)[1])
    checkpoint = tmp_path / "part" / "custom" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == stopped
    assert max(scalar(read_events(tmp_path / "part" / "custom"), "train/loss")) == stopped - 1
    last = stopped + 103
    status, _, errors = finish(command(last, "output_dir=rest", f"ckpt_path={checkpoint}"))
    assert status == 0, errors
    status, _, errors = finish(command(last, "output_dir=whole"))
    assert (status, errors) == (0, "")
    whole, rest = (read_events(tmp_path / name / "custom") for name in ("whole", "rest"))
    for tag in whole.Tags()["scalars"]:
        expected, found = ({k: v for k, v in scalar(e, tag).items() if k > stopped} for e in (whole, rest))
        # Means of nearly nothing depend on where in memory the summands lie.
        exact = tag in ("train/loss", "val/loss")
        assert found == (expected if exact else pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)), tag
    torch.testing.assert_close(*(weights(tmp_path / name / "custom") for name in ("whole", "rest")), rtol=0, atol=0)


def test_ctrl_c_ends_all_processes_with_a_word_on_what_there_is(tmp_path):
    process = start(tmp_path, *TRAIN, "trainer=ddp_cpu", "trainer.max_steps=100000", "output_dir=out")
    wait_for_files(process, tmp_path, "out/custom/checkpoints/last.ckpt")
    # As a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    status, _, errors = finish(process, 60)
    assert status == 1 and "Traceback" not in errors
    assert f"To train the rest: the same command with resume=true output_dir={tmp_path / 'out'}" in errors


def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(tiny_mnist, tmp_path):
    options = (
        "+experiment=mnist_elu", "model.norm=custom", f"data.data_dir={tiny_mnist}", "data.num_val=100",
        "data.batch_size=20", "trainer.max_epochs=40", "trainer.log_every_n_steps=1", "callbacks=bare",
    )  # fmt: skip
    begin = time.monotonic()
    status, _, errors = finish(start(tmp_path, *TRAIN, *options, "output_dir=whole"))
    assert (status, errors) == (0, "")
    seconds = time.monotonic() - begin
    for kill in range(3):
        part = tmp_path / f"part{kill}"
        moment = random.uniform(0.4, 1.0) * seconds
        process = start(tmp_path, *TRAIN, *options, f"output_dir={part}")
        time.sleep(moment)
        process.kill()
        finish(process)
        where = f"killed after {moment:.3f} of {seconds:.3f} s"
        # A file that was being written is not there in part.
        checkpoint = part / "custom" / "checkpoints" / "last.ckpt"
        if checkpoint.is_file() and not (part / "custom" / "finished").exists():
            epoch = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
            if epoch["processed"] < 40:
                rest = tmp_path / f"rest{kill}"
                status, _, errors = finish(
                    start(tmp_path, *TRAIN, *options, f"output_dir={rest}", f"ckpt_path={checkpoint}")
                )
                assert status == 0, (where, errors)
                assert_same_end(tmp_path / "whole" / "custom", rest / "custom", where)
        status, _, errors = finish(start(tmp_path, *TRAIN, *options, f"output_dir={part}", "resume=true"))
        assert (status, errors) == (0, ""), where
        assert_same_training(tmp_path / "whole" / "custom", part / "custom")


def assert_same_end(whole, rest, where):
    for tag in ("val/acc", "val/loss", "test/acc", "test/loss"):
        a, b = (scalar(read_events(path), tag) for path in (whole, rest))
        assert b and b == {step: value for step, value in a.items() if step >= min(b)}, (where, tag)
    weights = [
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (whole, rest)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0, msg=where)


@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_full_disk_is_told_and_what_was_written_is_readable(trainer, tmp_path):
    # No file may grow beyond this, as on a full disk, in the midst of training.
    limit = 1_000_000
    process = start(
        tmp_path, *TRAIN, f"trainer={trainer}", "trainer.max_steps=100000", "output_dir=out",
        "callbacks.activation_monitor.every_n_steps=1",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    status, _, errors = finish(process, 120)
    assert status == 1
    assert re.search(r"^.*out/custom cannot be written \(File too large\): make room there, or give", errors, re.M)
    assert "Traceback" not in errors
    assert f"To train the rest: the same command with resume=true output_dir={tmp_path / 'out'}" in errors
    assert len(scalar(read_events(tmp_path / "out" / "custom"), "train/loss")) > 5
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("method", ["add_scalar", "flush"])
def test_a_full_disk_is_told_wherever_it_is_met(method, tmp_path):
    # The writer raises what its thread has met, at whichever call comes next.
    (tmp_path / "full.py").write_text(
        f"""import errno

from bnlightning.train import RunLogger


class Full(RunLogger):
    @property
    def experiment(self):
        writer = super().experiment
        writer.{method} = self.refuse
        return writer

    def refuse(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
"""
    )
    process = start(tmp_path, *TRAIN, "trainer.logger._target_=full.Full", "trainer.max_steps=20", "output_dir=out")
    status, _, errors = finish(process, 120)
    assert status == 1
    assert re.search(r"^.*out/custom cannot be written \(No space left on device\): make room there", errors, re.M)
    assert "Traceback" not in errors


def test_processes_that_the_trainer_does_not_know_of_are_refused(tmp_path):
    for argument, message in (
        ("trainer.devices=1", r"^trainer\.devices=1 with trainer\.num_nodes=1 is not possible in 2 processes: give as"),
        ("model.norm=batch", r"^norm='batch' is not known"),
    ):
        status, _, errors = finish(start(tmp_path, *TORCHRUN, "2", *TRAIN, argument, "output_dir=out"), 60)
        assert status == 1
        assert len(re.findall(message, errors, re.M)) == 1, errors
        assert list(tmp_path.iterdir()) == []


def test_the_documented_commands_are_such(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    commands = re.findall(r"-m bnlightning\.train ([^`\n]*)", text)
    (launcher,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "cluster.yaml").write_text(launcher)
    assert len(commands) >= 7 and sum("hydra/launcher=cluster" in command for command in commands) == 1
    for command in commands:
        status, output, errors = finish(start(tmp_path, *TRAIN, *shlex.split(command), "--cfg", "job"))
        assert (status, errors) == (0, "") and "devices:" in output, command
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_hydras_launchers_give_the_same_runs(launcher, tmp_path):
    sweep = (*TRAIN, "+experiment=tanh", "model.norm=none,custom", "trainer.max_steps=10")
    one, other = (
        finish(start(tmp_path, *sweep, f"hydra/launcher={name}", f"output_dir={name}")) for name in ("basic", launcher)
    )
    assert one[0] == other[0] == 0 and one[2] == other[2] == "", other
    submitit = [name for name in files(tmp_path / launcher) if not name.startswith(".submitit/")]
    assert submitit == files(tmp_path / "basic")
    for variant in ("none", "custom"):
        assert_same_training(tmp_path / "basic" / variant, tmp_path / launcher / variant)
