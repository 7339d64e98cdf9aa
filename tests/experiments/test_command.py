import csv
import errno
import os
import pickle
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import read_events, scalar
from omegaconf import OmegaConf

from bnlightning.compare.comparison import NotWritten
from bnlightning.compare.figures import draw_parameter
from bnlightning.compare.runs import read_run
from bnlightning.experiments import CompareRuns, faults
from bnlightning.experiments.command import Command, main
from bnlightning.experiments.listing import find_experiments

from .commands import SHORT, assert_same_results, run_directory

EXPERIMENTS = [experiment.name for experiment in find_experiments() if not experiment.needs_mnist]
# By what an experiment sweeps; the others' are these two.
VARIANTS = {"moving_average": {"custom_convention-keras", "custom_convention-pytorch"}}


def test_where_a_launcher_takes_it_a_command_knows_what_is_swept_and_no_more():
    command = Command(("seed", "model.norm"))
    # What no other process could have.
    command.workers, command.first_job = threading.Lock(), 3
    elsewhere = pickle.loads(pickle.dumps(command.do)).__self__
    assert elsewhere.swept == ("seed", "model.norm")
    assert (elsewhere.workers, elsewhere.ranks, elsewhere.directory, elsewhere.first_job) == (None, None, None, 0)
    assert elsewhere.leads and not elsewhere.signals.interrupted


def test_hydras_callback_acts_for_the_command_that_runs(monkeypatch):
    begun = []
    monkeypatch.setattr(Command, "begin", lambda self, config: begun.append((self, config)))
    command = Command()
    token = Command.running.set(command)
    CompareRuns().on_multirun_start("config")
    Command.running.reset(token)
    # In somebody else's application there is none.
    CompareRuns().on_multirun_start("theirs")
    assert begun[0] == (command, "config")
    assert begun[1][0] is not command and begun[1][1] == "theirs"


def test_runs_that_cannot_be_compared_are_finished_all_the_same(tmp_path, capsys):
    Command().end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), "val/loss", None)
    told = capsys.readouterr().err
    assert told.startswith(f"The runs in {tmp_path} are finished, but not compared: ")


def test_what_is_compared_but_not_written_is_printed(tmp_path, capsys, monkeypatch):
    comparison = SimpleNamespace(directory=tmp_path, print_tables=lambda: print("the tables"))

    def refuse(*arguments):
        raise NotWritten(comparison, OSError(errno.EROFS, "Read-only file system"))

    monkeypatch.setattr("bnlightning.experiments.command.compare_sweep", refuse)
    Command().end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), "val/loss", None)
    told = capsys.readouterr()
    assert told.out == "the tables\n"
    assert (
        told.err == f"The comparison is not written: '{tmp_path}' cannot be written (Read-only file system). Make room "
        "there, or copy the runs to where you may write.\n"
    )


@pytest.mark.parametrize(
    ("ends", "begun", "told"),
    [
        ([None, None, None], ["tanh", "relu", "sigmoid"], None),
        (["refused", 1, None], ["tanh", "relu", "sigmoid"], "Experiments: tanh, relu failed."),
        ([None, RuntimeError("mine"), None], ["tanh", "relu", "sigmoid"], "Experiments: relu failed."),
        # As Lightning leaves a fit that Ctrl-C ended.
        ([None, "ctrl-c", None], ["tanh", "relu"], "Experiments: relu failed; sigmoid not begun."),
    ],
)
def test_experiments_are_done_one_after_another(ends, begun, told, monkeypatch, capsys):
    done = []

    def run(self):
        end = ends[len(done)]
        done.append(self.experiment)
        assert sys.argv[1:] == [f"+experiment={self.experiment}", f"output_dir='out/{self.experiment}'"]
        os.environ["LOCAL_RANK"] = "0"
        if isinstance(end, Exception):
            raise end
        self.signals.interrupted = end == "ctrl-c"
        if end is not None:
            sys.exit(end)

    monkeypatch.setattr(Command, "run", run)
    monkeypatch.setattr("sys.argv", ["train", "experiment=tanh,relu,sigmoid", "output_dir=out"])
    if told is None:
        main()
    else:
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == told
    assert done == begun and "LOCAL_RANK" not in os.environ
    errors = capsys.readouterr().err
    assert ("refused" in errors) == ("refused" in ends) and ("RuntimeError: mine" in errors) == ("mine" in str(ends))


def test_several_experiments_on_ranks_that_others_started_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", "experiment=tanh,relu"])
    monkeypatch.setattr("bnlightning.experiments.command.is_one_of_several", lambda: True)
    for is_first in (True, False):
        monkeypatch.setattr("bnlightning.experiments.command.is_first", lambda is_first=is_first: is_first)
        with pytest.raises(SystemExit) as end:
            main()
        # One of them says it.
        assert end.value.code == (faults.EXPERIMENTS_ON_RANKS if is_first else 1)


@pytest.mark.slow
def test_several_experiments_leave_what_each_leaves_alone(run_module, tmp_path):
    options = ("trainer.max_steps=5",)
    together = run_module("bnlightning.train", "experiment=tanh,sigmoid", *options, "output_dir=out")
    assert together.returncode == 0 and together.stderr == "", together.stderr
    alone = run_module("bnlightning.train", "experiment=sigmoid", *options, "output_dir=sigmoid")
    assert alone.returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tanh", "sigmoid"}
    for variant in ("none", "custom"):
        assert (tmp_path / "out" / "tanh" / variant / "finished").is_file()
        assert_same_results(tmp_path / "out" / "sigmoid" / variant, tmp_path / "sigmoid" / variant)
    assert (tmp_path / "out" / "tanh" / "comparison.png").is_file()
    again = run_module("bnlightning.train", "experiment=tanh,sigmoid", *options, "output_dir=out", "resume=true")
    assert again.returncode == 0 and again.stdout.count("Finished already: ") == 4


# Those on MNIST are run in test_mnist_experiments.py.
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_and_leaves_one_tidy_directory(experiment, run_module, tmp_path):
    # Twelve steps: the fit's last evaluation is at step 10, and the command evaluates once more at the end.
    result = run_module("bnlightning.train", f"+experiment={experiment}", "trainer.max_steps=12")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    directory = run_directory(tmp_path, experiment)
    files = {path.name for path in directory.iterdir()}
    variants = VARIANTS.get(experiment, {"none", "custom"})
    assert files == {"multirun.yaml", "comparison", "comparison.png", "comparison.csv", "comparison.md"} | variants
    for variant in variants:
        names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in (directory / variant).iterdir()}
        assert names == {"events.out.tfevents", "checkpoints", ".hydra", "hparams.yaml", "finished"}
        assert [path.name for path in (directory / variant / "checkpoints").iterdir()] == ["last.ckpt"]
        assert OmegaConf.load(directory / variant / ".hydra" / "config.yaml").model.norm == variant.split("_")[0]
        logged = read_events(directory / variant)
        assert list(scalar(logged, "val/loss")) == [0, 5, 10, 12]
        assert list(scalar(logged, "train/loss")) == list(range(12))
        first_layer = next((tag for tag in logged.Tags()["histograms"] if tag.startswith("layer_val_hist/")), None)
        predictions = [step for step, _ in read_run(directory / variant, directory).predictions]
        if experiment == "moving_average":
            assert first_layer is None and not predictions
        else:
            assert [h.step for h in logged.Histograms(first_layer)] == predictions == [0, 10, 12]
        checkpoint = torch.load(directory / variant / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 12
    assert str(directory / "comparison.png") in result.stdout
    assert f"tensorboard --logdir {directory}" in result.stdout
    assert "comparison" in read_events(directory / "comparison").Tags()["images"]


@pytest.mark.slow
def test_the_command_line_narrows_and_widens_the_variants(run_module, tmp_path):
    run_module("bnlightning.train", "+experiment=tanh", "model.norm=torch", *SHORT)
    directory = run_directory(tmp_path, "tanh")
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"torch", "comparison"}
    result = run_module(
        "bnlightning.train", "+experiment=tanh", "model.norm=none,torch", "seed=1,2", "output_dir=here", *SHORT
    )
    names = {path.name for path in (tmp_path / "here").iterdir() if path.is_dir()}
    assert names == {"none_seed-1", "none_seed-2", "torch_seed-1", "torch_seed-2", "comparison"}
    with (tmp_path / "here" / "comparison.csv").open() as file:
        assert [(row["variant"], row["seeds"]) for row in csv.DictReader(file)] == [
            ("no norm", "1, 2"),
            ("batch norm (torch)", "1, 2"),
        ]
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
    assert {path.name for path in run_directory(tmp_path, "train").iterdir() if path.is_dir()} == {
        "custom",
        "comparison",
    }


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
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(tmp_path / "out" / "custom" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "exp_avg" in checkpoint["optimizer_states"][0]["state"][0]
