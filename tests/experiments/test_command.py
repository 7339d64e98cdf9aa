import csv
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import read_events, scalar, wait_for_files
from omegaconf import OmegaConf

from bnlightning import CONF_DIR
from bnlightning.compare.figures import draw_parameter
from bnlightning.compare.runs import read_run

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
ON_MNIST = {"init_scale", "learning_rate", "mnist_conv", "mnist_elu", "mnist_he", "mnist_replay", "vanishing_gradient"}
# By what an experiment sweeps; the others' are these two.
VARIANTS = {"moving_average": {"custom_convention-keras", "custom_convention-pytorch"}}
SHORT = ("trainer.max_steps=10", "callbacks.activation_monitor.every_n_steps=5")


def only_directory(parent):
    (directory,) = parent.iterdir()
    return directory


def start(tmp_path, *arguments, **options):
    """The command in the background."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(
        [sys.executable, "-m", "bnlightning.train", *arguments], cwd=tmp_path, env=environment, **options
    )


def assert_same_results(first, second):
    """Every number and every weight that two runs wrote, bit by bit."""
    one, two = read_events(first), read_events(second)
    assert one.Tags() == two.Tags() and len(one.Tags()["scalars"]) > 5
    for tag in one.Tags()["scalars"]:
        # As lists: what was written twice would not show in a dictionary.
        a, b = ([(item.step, np.float32(item.value).tobytes()) for item in e.Scalars(tag)] for e in (one, two))
        assert a == b, tag
    for tag in one.Tags()["histograms"]:
        a, b = ([(h.step, h.histogram_value) for h in e.Histograms(tag)] for e in (one, two))
        assert a == b, tag
    for tag in one.Tags()["tensors"]:
        a, b = ([(t.step, t.tensor_proto.SerializeToString()) for t in e.Tensors(tag)] for e in (one, two))
        assert a == b, tag
    weights = [torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


def run_directory(tmp_path, experiment):
    """The one directory of the one command that ran."""
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [experiment]
    return only_directory(tmp_path / "outputs" / experiment)


# Those on MNIST are run in test_mnist_experiments.py.
@pytest.mark.parametrize("experiment", [experiment for experiment in EXPERIMENTS if experiment not in ON_MNIST])
def test_every_experiment_runs_and_leaves_one_tidy_directory(experiment, run_module, tmp_path):
    # Twelve steps: neither evaluated nor sampled in the ordinary course.
    result = run_module("bnlightning.train", f"+experiment={experiment}", "trainer.max_steps=12")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    directory = run_directory(tmp_path, experiment)
    files = {path.name for path in directory.iterdir()}
    (events,) = [name for name in files if name.endswith(".comparison")]
    variants = VARIANTS.get(experiment, {"none", "custom"})
    assert files - {events} == {"multirun.yaml", "comparison.png", "comparison.csv", "comparison.md"} | variants
    for variant in variants:
        names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in (directory / variant).iterdir()}
        assert names == {"events.out.tfevents", "checkpoints", ".hydra", "hparams.yaml", "finished"}
        assert [path.name for path in (directory / variant / "checkpoints").iterdir()] == ["last.ckpt"]
        assert OmegaConf.load(directory / variant / ".hydra" / "config.yaml").model.norm == variant.split("_")[0]
        logged = read_events(directory / variant)
        assert list(scalar(logged, "val/loss")) == [0, 5, 10, 12]
        assert list(scalar(logged, "train/loss")) == list(range(12))
        first_layer = next((tag for tag in logged.Tags()["histograms"] if tag.startswith("val_act_hist/")), None)
        predictions = [step for step, _ in read_run(directory / variant, directory).predictions]
        if experiment == "moving_average":
            assert first_layer is None and not predictions
        else:
            assert [h.step for h in logged.Histograms(first_layer)] == predictions == [0, 12]
        checkpoint = torch.load(directory / variant / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 12
    assert str(directory / "comparison.png") in result.stdout
    assert f"tensorboard --logdir {directory}" in result.stdout
    assert "comparison" in read_events(directory).Tags()["images"]


@pytest.mark.slow
def test_the_command_line_narrows_and_widens_the_variants(run_module, tmp_path):
    run_module("bnlightning.train", "+experiment=tanh", "model.norm=torch", *SHORT)
    directory = run_directory(tmp_path, "tanh")
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"torch"}
    result = run_module(
        "bnlightning.train", "+experiment=tanh", "model.norm=none,torch", "seed=1,2", "output_dir=here", *SHORT
    )
    names = {path.name for path in (tmp_path / "here").iterdir() if path.is_dir()}
    assert names == {"none_seed-1", "none_seed-2", "torch_seed-1", "torch_seed-2"}
    with (tmp_path / "here" / "comparison.csv").open() as file:
        assert [(row["variant"], row["seeds"]) for row in csv.DictReader(file)] == [("none", "1, 2"), ("torch", "1, 2")]
    assert "1, 2" in result.stdout


@pytest.mark.slow
def test_an_experiment_chooses_metric_and_figure(run_module, tmp_path):
    experiment = tmp_path / "conf" / "experiment" / "rates.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(
        """# @package _global_
rate: learning_rate
hydra:
  callbacks:
    compare:
      metric: train/loss
      draw: {_target_: bnlightning.compare.figures.draw_parameter, _partial_: true, parameter: "${rate}"}
  sweeper:
    params:
      model.learning_rate: 0.001,0.01
"""
    )
    result = run_module("bnlightning.train", "--config-dir=conf", "+experiment=rates", "output_dir=here", *SHORT)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    runs = [read_run(tmp_path / "here" / f"custom_learning_rate-{rate}", tmp_path / "here") for rate in (0.001, 0.01)]
    pixels = matplotlib.image.imread(tmp_path / "here" / "comparison.png")
    expected = draw_parameter({run.variant: [run] for run in runs}, "train/loss", "here", [], parameter="learning_rate")
    expected.savefig(tmp_path / "expected.png")
    np.testing.assert_array_equal(pixels, matplotlib.image.imread(tmp_path / "expected.png"))
    (tmp_path / "here" / "comparison.png").unlink()
    assert run_module("bnlightning.compare", "here").returncode == 0
    np.testing.assert_array_equal(pixels, matplotlib.image.imread(tmp_path / "here" / "comparison.png"))


@pytest.mark.slow
def test_without_an_experiment_it_trains_the_default_and_says_how_to_look(run_module, tmp_path):
    result = run_module("bnlightning.train", *SHORT)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in run_directory(tmp_path, "train").iterdir() if path.is_dir()} == {"custom"}


@pytest.mark.slow
def test_variants_share_data_batches_and_weights_and_a_seed_repeats_its_numbers(run_module, tmp_path):
    for name in ("first", "second"):
        result = run_module("bnlightning.train", "+experiment=tanh", f"output_dir={name}", "seed=4", *SHORT)
        assert result.returncode == 0, result.stderr
    for variant in ("none", "custom"):
        first, second = (read_events(tmp_path / name / variant) for name in ("first", "second"))
        tags = first.Tags()["scalars"]
        assert tags == second.Tags()["scalars"] and "val_health/act_saturated" in tags
        assert all(scalar(first, tag) == scalar(second, tag) for tag in tags)
        for tag in first.Tags()["histograms"]:
            a, b = ([h.histogram_value for h in events.Histograms(tag)] for events in (first, second))
            assert a == b
    # The input is the same in both variants: raw in the one, in the other less its mean and over its deviation.
    raw, normal = (
        read_events(tmp_path / "first" / v).Histograms("act_hist/net.input_norm")[0] for v in ("none", "custom")
    )
    raw, normal = raw.histogram_value, normal.histogram_value
    mean, std = raw.sum / 10, np.sqrt(raw.sum_squares / 10 - (raw.sum / 10) ** 2)
    assert normal.max == pytest.approx((raw.max - mean) / std, rel=1e-3)


@pytest.mark.slow
def test_relu_without_normalisation_diverges_and_is_not_called_dead(run_module, tmp_path):
    result = run_module("bnlightning.train", "+experiment=relu", "trainer.max_steps=50")
    assert result.returncode == 0, result.stderr
    directory = run_directory(tmp_path, "relu")
    events = read_events(directory / "none")
    losses = scalar(events, "train/loss")
    assert np.isfinite(losses[0]) and not any(np.isfinite(loss) for step, loss in losses.items() if step >= 1)
    (found,) = events.Tensors("health/first_nonfinite_layer/text_summary")
    layer = found.tensor_proto.string_val[0].decode()
    assert found.step == 1 and re.fullmatch(r"net\.(linear[1-7]|output)", layer)
    for index in range(1, 8):
        assert scalar(events, f"val_act_nonfinite/net.act{index}")[50] == 1.0
        assert scalar(events, f"val_act_dead/net.act{index}")[50] == 0.0
    with (directory / "comparison.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows["none"]["final cost"] == "not finite" and rows["none"]["first non-finite"] == f"step 1, {layer}"
    assert rows["none"]["dead"] == "0.0 %" and rows["none"]["non-finite"] == "100.0 %"
    assert rows["custom"]["first non-finite"] == "none seen"
    assert (
        "Diverged is not dead" in result.stdout and "Diverged is not dead" in (directory / "comparison.md").read_text()
    )


@pytest.mark.slow
def test_moving_averages_after_one_step_are_the_published_ones(run_module, tmp_path):
    with (Path(__file__).parents[1] / "reference" / "moving_average.csv").open() as file:
        published = {row["metric"]: row["published"] for row in csv.DictReader(file)}
    result = run_module("bnlightning.train", "+experiment=moving_average")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    directory = run_directory(tmp_path, "moving_average")
    keras, pytorch = (read_events(directory / f"custom_convention-{name}") for name in ("keras", "pytorch"))
    for metric, text in published.items():
        for prefix in ("test", "published"):
            (value,) = scalar(keras, f"{prefix}/{metric}").values()
            assert np.array2string(np.float32([value]))[1:-1].removesuffix(".") == text, metric
    assert scalar(keras, "test/running_var") == {1: np.float32(0.74709475)}
    assert scalar(keras, "test/norm_output_x0") == {1: np.float32(-0.40697935)}
    assert scalar(keras, "test/norm_output_x1") == {1: np.float32(1.215785)}
    assert f"{scalar(pytorch, 'test/running_var')[1]:.7g}" == "0.9941896"
    again = run_module("bnlightning.compare", str(directory))
    for output in (result.stdout, again.stdout):
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
        printed = {row[0]: row[1:] for row in rows if len(row) == 4 and row[0] in published}
        assert {metric: row[:2] for metric, row in printed.items()} == {m: [text] * 2 for m, text in published.items()}
        assert printed["running_var"][2] == "≠ 0.99418956" and printed["running_mean"][2] == "0.3514931"
        assert "running variance 0.7470948 = 0.5 * 1 before the step + 0.5 * 0.4941896" in output
        assert "running variance 0.9941896 = 0.5 * 1 before the step + 0.5 * 0.9883791" in output


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["torch", "none"])
def test_moving_averages_of_other_layers(norm, run_module, tmp_path):
    result = run_module("bnlightning.train", "+experiment=moving_average", f"model.norm={norm}", "seed=3")
    assert result.returncode == 0, result.stderr
    for convention in ("keras", "pytorch"):
        events = read_events(run_directory(tmp_path, "moving_average") / f"{norm}_convention-{convention}")
        if norm == "torch":
            assert f"{scalar(events, 'test/running_var')[1]:.7g}" == "0.9941896"
        else:
            assert "test/running_var" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_a_checkpoint_can_be_resumed_to_the_same_numbers(run_module, tmp_path):
    short = ("model.norm=custom", "data.num_points=200", "trainer.max_steps=-1")
    whole = run_module("bnlightning.train", *short, "trainer.max_epochs=2", "output_dir=whole")
    part = run_module("bnlightning.train", *short, "trainer.max_epochs=1", "output_dir=part")
    assert whole.returncode == part.returncode == 0, whole.stderr + part.stderr
    checkpoint = "ckpt_path=part/custom/checkpoints/last.ckpt"
    rest = run_module("bnlightning.train", *short, "trainer.max_epochs=2", "output_dir=rest", checkpoint)
    assert rest.returncode == 0, rest.stderr
    for tag in ("train/loss", "val/loss"):
        first, last = (scalar(read_events(tmp_path / name / "custom"), tag) for name in ("whole", "rest"))
        assert last and last == {step: value for step, value in first.items() if step >= min(last)}
    for arguments, message in (
        (("model.width=7",), r"^ckpt_path='.*' does not fit the model with norm='custom': .*\(.*size mismatch"),
        (("trainer.max_steps=20",), r"^ckpt_path='.*' is at step 20 already: give trainer.max_steps above it, not 20"),
        (
            ("trainer.max_epochs=1",),
            r"^ckpt_path='.*' is of 1 epoch\(s\) already: give trainer.max_epochs above it, not 1",
        ),
    ):
        result = run_module("bnlightning.train", *short, "output_dir=never", checkpoint, *arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert re.search(message, result.stderr, re.DOTALL), result.stderr
        assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_what_was_there_before_stays(run_module, tmp_path):
    first = run_module("bnlightning.train", "output_dir=out", "trainer.max_steps=5")
    assert first.returncode == 0
    (tmp_path / "out" / "custom" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ["output_dir=out"],
        ["output_dir=out", "model.depth=0"],
        ["output_dir=empty", "model.depth=0"],
        ["output_dir=empty", "trainer.devices=none"],
        ["output_dir=.", "model.depth=0"],
        ["output_dir=.", "model.norm=.."],
        ["output_dir=empty", f"model.norm={tmp_path / 'out'}"],
        ["hydra.mode=RUN", "hydra.run.dir=."],
    ):
        result = run_module("bnlightning.train", "trainer.max_steps=5", *arguments)
        assert result.returncode == 1, arguments
        assert sorted(tmp_path.rglob("*")) == before, arguments
    again = run_module("bnlightning.train", "output_dir=out")
    assert "output_dir=" in again.stderr and "holds runs already: give another" in again.stderr
    run_module("bnlightning.train", "--help", BNLIGHTNING_OUTPUT_DIR=str(tmp_path / "empty"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_one_refused_run_stops_the_sweep_before_the_first(run_module, tmp_path):
    result = run_module("bnlightning.train", "data.batch_size=10,1", "model.norm=none,custom", "output_dir=out")
    assert result.returncode == 1 and re.search(r"^batch_size=1 is not possible", result.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sweeps_are_named_by_what_they_sweep(run_module, tmp_path):
    result = run_module(
        "bnlightning.train",
        "+experiment=tanh,relu",
        "data.seed=3,4",
        "seed=1,2",
        "trainer.max_steps=5",
        "output_dir=out",
    )
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert names == {
        f"custom_experiment-{experiment}_data.seed-{data}_seed-{seed}"
        for experiment in ("tanh", "relu")
        for data in (3, 4)
        for seed in (1, 2)
    }
    with (tmp_path / "out" / "comparison.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["1, 2"] * 4


@pytest.mark.slow
def test_two_commands_in_the_same_second_stay_apart(tmp_path):
    # The clock is made to stand still.
    code = (
        "import sys, time; import omegaconf; from bnlightning import train; "
        "omegaconf.OmegaConf.register_new_resolver('now', lambda pattern: 'now', replace=True); "
        "sys.argv = ['train', 'trainer.max_steps=5']; train.main()"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    directories = list((tmp_path / "outputs" / "train").iterdir())
    assert len(directories) == 2
    for directory in directories:
        assert (directory / "comparison.png").is_file()
        assert list(scalar(read_events(directory / "custom"), "train/loss")) == [0, 1, 2, 3, 4]


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
def test_parallel_runs_give_what_they_give_one_after_the_other(run_module, tmp_path):
    sweep = ("model.norm=none,custom", "seed=1,2", *SHORT)
    one = run_module("bnlightning.train", *sweep, "output_dir=one")
    two = run_module("bnlightning.train", *sweep, "output_dir=two", "n_jobs=2")
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stderr == two.stderr == ""
    names = [f"{norm}_seed-{seed}" for norm in ("none", "custom") for seed in (1, 2)]
    assert one.stdout.splitlines()[:4] == [f"Training {name} on 1 thread" for name in names]
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
    processes = {path.name.split(".")[-2] for path in (tmp_path / "two").glob("*/events.out.tfevents.*")}
    (comparison,) = (tmp_path / "two").glob("*.comparison")
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
    assert output.count(b"Training custom_seed-") == 2
    assert (b"it/s" in output) == (n_jobs == 1)


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_killed_sweep_is_resumed_to_what_an_unbroken_one_gives(n_jobs, run_module, tmp_path):
    names = {f"custom_seed-{seed}" for seed in (1, 2, 3)}
    sweep = (
        "seed=1,2,3",
        "trainer.max_steps=200",
        "callbacks.activation_monitor.every_n_steps=100",
        f"n_jobs={n_jobs}",
    )
    whole = run_module("bnlightning.train", *sweep, "output_dir=whole")
    assert whole.returncode == 0, whole.stderr

    def states():
        finished = {path.parent.name for path in tmp_path.glob("part/*/finished")}
        return finished, {path.parent.name for path in tmp_path.glob("part/*/events.out.tfevents.*")} - finished

    process = start(tmp_path, *sweep, "output_dir=part")
    while not all(states()):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    # Ends when no process is left that could write, the workers included.
    process.communicate(timeout=60)
    finished, begun = states()
    assert finished and begun
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for name in finished
        for path in (tmp_path / "part" / name).rglob("*")
        if path.is_file()
    }
    result = run_module("bnlightning.train", *sweep, "output_dir=part", "resume=true")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert {line for line in lines if line.startswith("Finished already: ")} == {
        f"Finished already: {name}" for name in finished
    }
    assert {line for line in lines if line.startswith("Training ")} == {
        f"Training {name} on 1 thread" for name in names - finished
    }
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    for name in names:
        assert len(list((tmp_path / "part" / name).glob("events.out.tfevents.*"))) == 1
        assert_same_results(tmp_path / "whole" / name, tmp_path / "part" / name)
    assert (tmp_path / "part" / "comparison.png").is_file()


@pytest.mark.slow
def test_a_sweep_is_resumed_only_as_it_was(run_module, tmp_path):
    sweep = ("seed=1,2", "trainer.max_steps=5", "output_dir=out")
    assert run_module("bnlightning.train", *sweep).returncode == 0
    (tmp_path / "out" / "custom_seed-2" / "finished").unlink()
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    checkpoint = "ckpt_path=out/custom_seed-2/checkpoints/last.ckpt"
    for arguments, message in (
        ([*sweep], r"^output_dir='.*out' holds runs already: give another, .*resume=true"),
        (
            [*sweep, "resume=true", "model.weight_std=2.0", "trainer.max_steps=6"],
            r"^resume=true is not possible: '.*out/custom_seed-1' finished with "
            r"model\.weight_std=1\.0, not 2\.0; trainer\.max_steps=5, not 6\.",
        ),
        (["seed=1,2", "resume=true"], r"^resume=true needs to know which sweep: give its directory, output_dir=PATH"),
        (
            ["seed=2,3", "trainer.max_steps=6", "output_dir=out", "resume=true", checkpoint],
            r"^ckpt_path='.*' is of a run that resume=true begins again",
        ),
    ):
        result = run_module("bnlightning.train", *arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert re.search(message, result.stderr, re.MULTILINE), result.stderr
        assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    # Another number of runs is none of the configuration of each.
    (tmp_path / "out" / "custom_seed-3").mkdir()
    (tmp_path / "out" / "custom_seed-3" / "notes.txt").write_text("mine")
    fresh = run_module("bnlightning.train", "seed=1", "trainer.max_steps=5", "output_dir=new", "resume=true")
    assert fresh.stdout.startswith(f"Nothing to resume in {tmp_path / 'new'}: all runs are trained.\n")
    result = run_module("bnlightning.train", *sweep, "seed=1,2,3", "resume=true", "n_jobs=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Finished already: custom_seed-1\n")
    assert (tmp_path / "out" / "custom_seed-3" / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.glob("out/*/finished"))) == 3


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


@pytest.mark.slow
def test_the_number_of_threads_is_each_runs_own(run_module, tmp_path):
    options = ("model.norm=none", "trainer.max_steps=2", "callbacks=bare", "output_dir=out")
    result = run_module("bnlightning.train", "num_threads=2,null", *options, OMP_NUM_THREADS="1")
    assert result.stdout.splitlines()[:2] == [
        "Training none_num_threads-2 on 2 threads",
        "Training none_num_threads-None on 1 thread",
    ]


@pytest.mark.slow
def test_a_parallel_run_that_fails_is_named_in_one_message(run_module, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bnlightning import LitRegressor\n\n\n"
        "class Failing(LitRegressor):\n"
        "    def on_train_start(self):\n"
        "        if self.hparams['depth'] == 2:\n"
        "            raise RuntimeError('no more of this')\n"
    )
    result = run_module(
        "bnlightning.train", "model._target_=mine.Failing", "model.depth=2,3", "n_jobs=2", "trainer.max_steps=5",
        "output_dir=out", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("custom_depth-2: RuntimeError: no more of this")
    assert "Traceback" not in result.stderr and "custom_depth-3" not in result.stderr
    # The other had begun, and is finished.
    assert [path.parent.name for path in tmp_path.glob("out/*/finished")] == ["custom_depth-3"]
    result = run_module("bnlightning.train", "seed=1,2", "n_jobs=2", "trainer.devices=2", "output_dir=devices")
    assert result.returncode == 1
    assert re.search(
        r"^custom_seed-\d: n_jobs above 1 is not possible with 2 devices .*n_jobs=1\.\n$", result.stderr, re.MULTILINE
    )
    assert not (tmp_path / "devices").exists()


@pytest.mark.slow
def test_a_users_own_classes_by_yaml(run_module, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom bnlightning import LitRegressor\n\n\n"
        "class AdamRegressor(LitRegressor):\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.Adam(self.parameters(), lr=self.hparams['learning_rate'])\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "adam.yaml").write_text("defaults: [regressor]\n_target_: mine.AdamRegressor\n")
    result = run_module(
        "bnlightning.train", "--config-dir", "conf", "model=adam", "trainer.max_steps=5", "output_dir=out",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(tmp_path / "out" / "custom" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "exp_avg" in checkpoint["optimizer_states"][0]["state"][0]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["+experiment=tnah"],
            r"Could not find 'experiment/tnah'\n\nAvailable options in 'experiment':\n(\t\w+\n)*\trelu\n",
        ),
        (["model.norm=batch"], r"^norm='batch' is not known: choose one of none, custom, torch\.$"),
        (["model.activation=tan"], r"^activation='tan' is not known: choose one of elu, .*tanh\.$"),
        (["model.depth=0"], r"^depth=0 is not possible: give an integer of at least 1\.$"),
        (["model.width=-3"], r"^width=-3 is not possible: give an integer of at least 1\.$"),
        (["data.batch_size=1"], r"^batch_size=1 is not possible with norm='custom'.*Choose another data\.batch_size"),
        (["data.num_points=2501"], r"^batch_size=10 is not possible with norm='custom': it leaves a batch of one"),
        (["num_threads=0"], r"^num_threads=0 is not possible"),
        (["n_jobs=0"], r"^n_jobs=0 is not possible: give an integer of at least 1\.$"),
        (["seed=-1"], r"^seed=-1 is not possible: give an integer from 0 to 4294967295"),
        (["ckpt_path=missing.ckpt"], r"^ckpt_path='missing.ckpt' is not a file"),
        (["ckpt_path=a_file"], r"^ckpt_path='a_file' is no checkpoint of Lightning's, or a damaged one \("),
        (["resume=flase"], r"^resume='flase' is not possible: give true or false\.$"),
        (["seed=1,2,1"], r"^seed=1,2,1 would train the same run twice: give each value once\.$"),
        (["trainer.max_epochs=1.5"], r"^trainer\.max_epochs=1\.5 is not possible: give an integer of at least -1\.$"),
        (["trainer.max_steps=many"], r"^trainer\.max_steps='many' is not possible: give an integer of at least -1\.$"),
        (["trainer.devices=none"], r"devices"),
        pytest.param(
            ["trainer=gpu"],
            r"^trainer\.accelerator='gpu' is not possible: no GPU is found\. Give trainer=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["hydra.mode=RUN"], r"^hydra\.mode=RUN is not possible"),
        (
            ["output_dir=a_file/below"],
            r"^output_dir='.*a_file/below' cannot be written \(Not a directory\): give another",
        ),
        (["model.dpeth=3"], r"Could not override 'model\.dpeth'"),
    ],
)
def test_bad_input_gives_one_message_and_leaves_nothing(arguments, message, run_module, tmp_path):
    (tmp_path / "a_file").touch()
    result = run_module("bnlightning.train", *([] if "+" in arguments[0] else ["+experiment=tanh"]), *arguments)
    assert result.returncode == 1
    output = (result.stdout + result.stderr).strip()
    assert re.search(message, output, re.MULTILINE), output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.slow
def test_help_lists_the_experiments_and_the_values_people_change(run_module):
    result = run_module("bnlightning.train", "--help")
    assert result.returncode == 0
    assert all(f"+experiment={experiment} " in result.stdout for experiment in EXPERIMENTS)
    for key in (
        "model.norm",
        "model.activation",
        "model.depth",
        "model.width",
        "data.batch_size",
        "seed",
        "ckpt_path",
        "n_jobs",
    ):
        assert f"{key}=" in result.stdout
    assert "resume=true output_dir=PATH" in result.stdout
