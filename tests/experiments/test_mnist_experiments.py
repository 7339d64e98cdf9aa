"""The experiments on MNIST: all of them on a few images, the published ones on all where they are."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_events, scalar

from bnlightning import CONF_DIR
from bnlightning.compare.runs import find_runs, read_run

REFERENCE = Path(__file__).parents[1] / "reference"
WEIGHTS = f"callbacks.initial_weights.path={REFERENCE / 'mnist_initial_weights.npz'}"
EXPERIMENTS = sorted(
    path.stem
    for path in (CONF_DIR / "experiment").glob("*.yaml")
    if re.search(r"data: mnist$|- mnist_elu$", path.read_text(), re.M)
)
# Of those that sweep over more than suits a test, a few.
FEWER = {
    "init_scale": ["model.weight_std=1.0,0.01"],
    "learning_rate": ["model.learning_rate=0.01,1e30"],
    "vanishing_gradient": ["model.depth=3,4"],
    "mnist_conv": ["model.norm_placement=none,both_after"],
    "mnist_replay": [WEIGHTS, "model.norm=custom"],
}
RUNS = {"mnist_elu": 3, "mnist_he": 4, "init_scale": 4, "learning_rate": 4, "vanishing_gradient": 8, "mnist_conv": 2}

needs_mnist = pytest.mark.skipif(
    "BNLIGHTNING_DATA_DIR" not in os.environ, reason="BNLIGHTNING_DATA_DIR, where MNIST is, is not set"
)


def accuracies(norm, init_scale):
    """By seed, the validation accuracies of 20 epochs and the test accuracy of the original."""
    with (REFERENCE / "mnist_accuracy.csv").open() as file:
        return {
            int(row["seed"]): [float(row[f"epoch{epoch}"]) for epoch in range(1, 21)] + [float(row["test"])]
            for row in csv.DictReader(file)
            if (row["norm"], float(row["init_scale"])) == (norm, init_scale)
        }


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_on_a_few_images(experiment, run_module, tiny_mnist, tmp_path):
    result = run_module(
        "bnlightning.train", f"+experiment={experiment}", f"data.data_dir={tiny_mnist}", "data.num_val=100",
        "data.num_train=200", "data.batch_size=50", "trainer.max_epochs=2", "trainer.log_every_n_steps=2", "n_jobs=2",
        "output_dir=out", *FEWER.get(experiment, []),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    directory = tmp_path / "out"
    paths = find_runs(directory)
    assert len(paths) == RUNS.get(experiment, 1)
    for path in paths:
        events = read_events(path)
        assert list(scalar(events, "val/acc")) == [0, 4, 8] and list(scalar(events, "test/acc")) == [8]
        checkpoints = {checkpoint.stem for checkpoint in (path / "checkpoints").iterdir()}
        assert checkpoints == ({"last", "best"} if experiment.startswith("mnist") else {"last"})
        last = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == 8
    assert read_events(directory / "comparison").Tags()["images"] == ["comparison"]
    assert str(directory / "comparison.png") in result.stdout
    assert re.search(r"val/acc|final cost", result.stdout)


@needs_mnist
@pytest.mark.slow
def test_the_published_training_is_replayed_digit_by_digit(run_module, tmp_path):
    result = run_module("bnlightning.train", "+experiment=mnist_replay", WEIGHTS, "n_jobs=2", "output_dir=out")
    assert result.returncode == 0, result.stderr
    published = accuracies("custom", 1.0)[42]
    rows = {}
    for norm in ("custom", "torch"):
        events = read_events(tmp_path / "out" / norm)
        by_step = scalar(events, "val/acc")
        (test,) = scalar(events, "test/acc").values()
        rows[norm] = [f"{value:.4f}" for value in [*(by_step[275 * epoch] for epoch in range(1, 21)), test]]
    assert rows["custom"] == [f"{value:.4f}" for value in published]
    # torch's layer averages the unbiased variance.
    same = sum(a == f"{b:.4f}" for a, b in zip(rows["torch"][:20], published, strict=False))
    assert same < 10
    assert "of 20 values of val/acc, 20 are exactly the published ones" in result.stdout


@needs_mnist
@pytest.mark.slow
def test_medians_over_three_seeds_lie_beside_the_published_row(run_module, tmp_path):
    result = run_module(
        "bnlightning.train", "+experiment=mnist_elu", "seed=1,2,3", "callbacks=bare", "n_jobs=2", "output_dir=out"
    )
    assert result.returncode == 0, result.stderr
    runs = [read_run(path, tmp_path / "out") for path in find_runs(tmp_path / "out")]
    for norm in ("custom", "torch", "none"):
        own = [run for run in runs if run.variant == norm]
        assert len(own) == 3
        theirs = accuracies("none" if norm == "none" else "custom", 1.0)
        # Without normalisation nothing was published; there it is the median of the original's three seeds.
        expected = np.median(list(theirs.values()), axis=0) if norm == "none" else np.array(theirs[42])
        medians = [np.median([at(run, 275 * epoch) for run in own]) for epoch in range(1, 21)]
        print(norm, *(f"{median:.4f}" for median in medians))
        assert np.abs(np.array(medians) - expected[:20])[2:].max() <= 0.004, norm
        test = np.median([run.last("test/acc") for run in own])
        assert test == pytest.approx(expected[20], abs=0.004), norm


def at(run, step):
    steps, values = run.scalars["val/acc"]
    return values[steps.tolist().index(step)]
