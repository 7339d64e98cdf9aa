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
from lightning.pytorch.plugins.environments import SLURMEnvironment

from bnlightning import CONF_DIR
from bnlightning.compare.runs import find_runs
from bnlightning.experiments.ranks import Ranks

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
TRAIN = ("-m", "bnlightning.train")
# Fails in the first of two runs on one rank, at one place: by an exception or by a signal to itself.
FAILING = """
import os, signal, time
from bnlightning import LitRegressor


class Failing(LitRegressor):
    def fail_at(self, place):
        here = (place, self.trainer.global_rank) == (os.environ["PLACE"], int(os.environ["RANK_TO_FAIL"]))
        if self.hparams["depth"] != 2 or not here:
            return
        if "SIGNAL" not in os.environ:
            raise {"RuntimeError": RuntimeError, "ValueError": ValueError}[os.environ["ERROR"]]("no more of this")
        try:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass  # As where the interpreter collects garbage.

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            self.fail_at("training step")
        if self.global_step == self.trainer.max_steps - 1:
            self.fail_at("last step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 5:
            self.fail_at("batch end")

    def validation_step(self, batch, batch_idx):
        if self.trainer.state.fn == "validate" and self.global_step == 0:
            self.fail_at("first evaluation")
        return super().validation_step(batch, batch_idx)

    def on_validation_end(self):
        super().on_validation_end()
        if self.trainer.state.fn == "validate" and self.global_step > 0:
            self.fail_at("end of the last evaluation")
"""
FAILING_SWEEP = ("model._target_=mine.Failing", "model.depth=2,3", "trainer.max_steps=12")


def failing(place, rank, error="RuntimeError", **more):
    """The environment in which it does."""
    return {"PLACE": place, "RANK_TO_FAIL": str(rank), "ERROR": error} | more


def start(tmp_path, *arguments, **options):
    """Python with these arguments in the background, in a session of its own."""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | options.pop("environment", {})
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
        "Training no norm on 1 thread",
        "Training batch norm (ours) on 1 thread",
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
    # One variant of each.
    sweep = [f"experiment={','.join(names)}", "hydra.sweeper.params=null", "hydra.callbacks.compare.draw=null"]
    status, output, errors = finish(start(tmp_path, *TRAIN, *sweep, *short, "trainer=ddp_cpu", "output_dir=out"), 1200)
    assert (status, errors) == (0, ""), errors
    assert len(names) > 4 and output.count("Training ") == len(names)
    for name in names:
        (path,) = find_runs(tmp_path / "out" / name)
        assert (path / "finished").is_file()
        assert len(list(path.glob("events.out.tfevents.*"))) == 1
        assert (tmp_path / "out" / name / "comparison.png").is_file()


@pytest.mark.parametrize(
    ("launcher", "rank", "place", "error"),
    [
        # In a training step the others wait for it in a collective.
        ("lightning", 0, "training step", "ValueError"),
        ("torchrun", 1, "training step", "RuntimeError"),
        ("torchrun", 0, "batch end", "RuntimeError"),
        # Rank 0 has done all that there was to do.
        ("lightning", 1, "end of the last evaluation", "ValueError"),
    ],
)
def test_after_a_failure_on_one_rank_the_others_go_on_with_it(launcher, rank, place, error, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    command = TRAIN if launcher == "lightning" else (*TORCHRUN, "2", *TRAIN)
    sweep = (*FAILING_SWEEP, "trainer=ddp_cpu", "output_dir=out")
    status, output, errors = finish(start(tmp_path, *command, *sweep, environment=failing(place, rank, error)))
    assert status == 1
    reason = "no more of this" if error == "RuntimeError" else "ValueError amid the run: no more of this"
    assert f"custom_depth-2: rank {rank} has failed (RuntimeError: {reason})\n" in errors
    # With the place in the user's own code.
    assert errors.count("has failed") <= 2 and f'self.fail_at("{place}")' in errors
    assert "To train the rest: the same command with resume=true" in errors
    lines = output.splitlines()
    assert lines == [
        "Training batch norm (ours), depth 2 on 1 thread",
        "Training batch norm (ours), depth 3 on 1 thread",
    ]
    assert not (tmp_path / "out" / "custom_depth-2" / "finished").exists()
    # What came after it is what it would have been without.
    alone = tuple(argument for argument in sweep[:-1] if "depth" not in argument)
    status, _, errors = finish(
        start(tmp_path, *TRAIN, *alone, "model.depth=3", "output_dir=alone", environment=failing(place, -1))
    )
    assert (status, errors) == (0, "")
    assert_same_training(tmp_path / "out" / "custom_depth-3", tmp_path / "alone" / "custom")
    status, output, errors = finish(start(tmp_path, *command, *sweep, "resume=true", environment=failing(place, -1)))
    assert (status, errors) == (0, "")
    assert output.splitlines()[:2] == [
        "Training batch norm (ours), depth 2 on 1 thread",
        "Finished already: batch norm (ours), depth 3",
    ]
    assert len(list(tmp_path.glob("out/*/finished"))) == 2


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["first evaluation", "last step"])
def test_sigterm_is_answered_wherever_training_is(place, processes, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    trainer = "trainer=cpu" if processes == 1 else "trainer=ddp_cpu"
    environment = failing(place, processes - 1, SIGNAL=str(int(signal.SIGTERM)))
    status, output, errors = finish(
        start(tmp_path, *TRAIN, *FAILING_SWEEP, trainer, "output_dir=out", environment=environment), 120
    )
    assert status == 1 and "Traceback" not in errors, errors
    where = "in an evaluation" if place == "first evaluation" else r"after step 12: .*last\.ckpt"
    assert len(re.findall(rf"^Stopped by SIGTERM {where}$", errors, re.M)) == 1, errors
    # Neither is it forgotten by the next run, nor the run that it ended taken for a finished one.
    assert output == "Training batch norm (ours), depth 2 on 1 thread\n"
    assert not list(tmp_path.glob("out/*/finished"))


def test_ctrl_c_is_heard_where_the_interpreter_swallows_it(tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    environment = failing("training step", 0, SIGNAL=str(int(signal.SIGINT)))
    status, output, errors = finish(
        start(tmp_path, *TRAIN, *FAILING_SWEEP, "output_dir=out", environment=environment), 120
    )
    assert status == 1 and "Traceback" not in errors
    assert (
        output == "Training batch norm (ours), depth 2 on 1 thread\n"
        and "To train the rest: the same command" in errors
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_all_are_gone_within_a_minute(rank, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    process = start(
        tmp_path, *TRAIN, *FAILING_SWEEP, "trainer=ddp_cpu", "output_dir=out",
        environment=failing("training step", rank, SIGNAL=str(int(signal.SIGKILL))),
    )  # fmt: skip
    (written,) = wait_for_files(process, tmp_path, "out/custom_depth-2/events*")
    status, output, errors = finish(process, 60)
    assert status != 0 and output == "Training batch norm (ours), depth 2 on 1 thread\n"
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


@pytest.mark.parametrize("method", ["add_summary", "flush"])
def test_a_full_disk_is_told_wherever_it_is_met(method, tmp_path):
    # The writer raises what its thread has met, at whichever call comes next.
    (tmp_path / "full.py").write_text(
        f"""import errno

from bnlightning.experiments import RunLogger


class Full(RunLogger):
    @property
    def experiment(self):
        writer = super().experiment
        writer._get_file_writer().{method} = self.refuse
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
        ("model.norm=batch", r"^model\.norm='batch' is not known"),
    ):
        status, _, errors = finish(start(tmp_path, *TORCHRUN, "2", *TRAIN, argument, "output_dir=out"), 60)
        assert status == 1
        assert len(re.findall(message, errors, re.M)) == 1, errors
        assert list(tmp_path.iterdir()) == []


def test_processes_that_do_not_find_each_other_are_refused(tmp_path):
    others = {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    status, _, errors = finish(
        start(tmp_path, *TRAIN, "trainer=ddp_cpu", environment=others | {"MASTER_PORT": "29777"}), 60
    )
    assert status == 1 and "Traceback" not in errors
    assert re.search(r"^2 processes that something else has started are not possible \(LOCAL_RANK=0", errors, re.M)
    # The agent's own port is not to be had then.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    status, _, errors = finish(start(tmp_path, *TORCHRUN, "2", "--standalone", *TRAIN, environment=environment), 60)
    assert status == 1 and "torchrun without a store of its agent's is not possible" in errors
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_slurm_on_one_machine_have_ports_of_their_own(monkeypatch):
    job = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for key, value in (job | {"SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS_PER_NODE": "2"}).items():
        monkeypatch.setenv(key, value)
    theirs, ours = set(), set()
    for number in ("20007", "20008", "29999"):
        monkeypatch.setenv("SLURM_JOB_ID", number)
        for variable in ("MASTER_ADDR", "MASTER_PORT"):
            # So that it is put back, too.
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)
        theirs.add(SLURMEnvironment(auto_requeue=False).main_port)
        ranks = Ranks.started_by_others()
        ours.add(int(ranks.address.rpartition(":")[2]))
        # As after a signal: nobody else comes.
        ranks.begin(0)
        ranks.close()
    assert len(theirs) == len(ours) == 3 and not theirs & ours


def test_a_second_command_in_one_process_is_refused(tmp_path):
    # Lightning's launcher starts the other ranks by the script that called it, from its beginning.
    (tmp_path / "twice.py").write_text(
        """import sys

from bnlightning.train import main

for number in (1, 2):
    sys.argv[1:] = ["trainer=ddp_cpu", "trainer.max_steps=5", "callbacks=bare", f"output_dir=out{number}"]
    main()
"""
    )
    status, output, errors = finish(start(tmp_path, "twice.py"), 120)
    assert status == 1 and output.count("Training batch norm (ours) on 1 thread") == 1
    assert re.search(r"^2 processes that something else has started are not possible \(LOCAL_RANK=0", errors, re.M)
    assert not list(tmp_path.glob("out2/*/events*"))
    assert (tmp_path / "out1" / "custom" / "finished").exists()


def test_the_documented_commands_are_such(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    commands = re.findall(r"-m bnlightning\.train ([^`\n]*)", text)
    (launcher,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "cluster.yaml").write_text(launcher)
    assert len(commands) >= 7 and sum("hydra/launcher=cluster" in command for command in commands) == 1
    for command in commands:
        status, output, errors = finish(start(tmp_path, *TRAIN, *shlex.split(command), "--cfg", "job"))
        assert (status, errors) == (0, "") and "devices:" in output, command
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_sigterm_leaves_none_of_joblibs_processes(tmp_path):
    process = start(
        tmp_path, *TRAIN, "model.depth=2,3", "trainer.max_steps=100000", "hydra/launcher=joblib", "output_dir=out"
    )
    written = wait_for_files(process, tmp_path, "out/*/checkpoints/last.ckpt", 2)
    process.terminate()
    status, _, errors = finish(process, 60)
    assert status == 1 and "Traceback" not in errors and "To train the rest: the same command" in errors
    before = [path.stat().st_mtime_ns for path in written]
    time.sleep(3)
    assert before == [path.stat().st_mtime_ns for path in written]


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
