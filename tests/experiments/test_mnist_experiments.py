"""The experiments on MNIST: all of them on a few images, the published ones on all where they are."""

import csv
import os
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from helpers import MemoryLogger, p_value, quiet_trainer, read_events, scalar
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from scipy.stats import truncnorm
from torchvision.datasets import MNIST

from bnlightning import CONF_DIR
from bnlightning.compare.runs import find_runs

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


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_on_a_few_images(experiment, run_module, tiny_mnist, tmp_path):
    result = run_module(
        "bnlightning.train", f"+experiment={experiment}", f"data.data_dir={tiny_mnist}", "data.num_val=100",
        "data.num_train=200", "data.batch_size=50", "trainer.max_epochs=2", "trainer.log_every_n_steps=2",
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
    assert "batch norm (ours): 20 of 20 values of val/acc are exactly the published ones." in result.stdout


SEEDS, PLAIN_SEEDS = range(101, 106), 12


def accuracies_of_ours(norm):
    """Those of several seeds after one epoch, from the experiment's own configuration, in this process."""
    found = []
    for seed in SEEDS:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("train", ["+experiment=mnist_elu", f"model.norm={norm}", f"seed={seed}"])
        lightning.seed_everything(config.seed, workers=True, verbose=False)
        model, data = (instantiate(config[part], _convert_="all") for part in ("model", "data"))
        logger = MemoryLogger()
        quiet_trainer(logger=logger, max_epochs=1).fit(model, data)
        found.append(logger.scalars["val/acc", 275])
    return found


class PlainClassifiers:
    """The formulas in torch, for many seeds at once along the first dimension."""

    def __init__(self, normalized, seeds, rng, scale):
        self.normalized = normalized
        sizes = [784, 300, 100, 10]
        cut = truncnorm(-2, 2)
        self.weights = [
            torch.as_tensor(
                cut.rvs((seeds, *pair), random_state=rng) / cut.std() * (scale / pair[0]) ** 0.5, dtype=torch.float32
            )
            for pair in pairwise(sizes)
        ]
        self.biases = [torch.zeros(seeds, 1, size) for size in sizes[1:]]
        self.scales = [torch.ones(seeds, 1, size) for size in sizes[1:]]
        self.shifts = [torch.zeros(seeds, 1, size) for size in sizes[1:]]
        self.running = [[torch.zeros(seeds, 1, size), torch.ones(seeds, 1, size)] for size in sizes[1:]]
        trained = self.weights + self.biases + (self.scales + self.shifts if normalized else [])
        self.parameters = [parameter.requires_grad_() for parameter in trained]

    def forward(self, x, evaluates=False):
        for layer in range(3):
            x = torch.baddbmm(self.biases[layer], x, self.weights[layer])
            if self.normalized:
                x = self.normalise(x, layer, evaluates)
            if layer < 2:
                x = torch.where(x > 0, x, x.clamp(max=0).exp() - 1)
        return x

    def normalise(self, x, layer, evaluates):
        mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        if evaluates:
            mean, variance = self.running[layer]
        else:
            batch = (mean.detach(), variance.detach())
            self.running[layer] = [0.9 * old + 0.1 * new for old, new in zip(self.running[layer], batch, strict=True)]
        return (x - mean) / (variance + 1e-3).sqrt() * self.scales[layer] + self.shifts[layer]

    def descend(self, x, y):
        log_p = self.forward(x).log_softmax(-1)
        # The sum over seeds, because they have nothing to do with each other.
        loss = -log_p.gather(-1, y[..., None]).mean((1, 2)).sum()
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.data -= 0.01 * gradient

    @torch.no_grad()
    def accuracies(self, x, y):
        return (self.forward(x, evaluates=True).argmax(-1) == y).float().mean(1).tolist()


@cache
def accuracies_of_plain(norm, seeds, scale=1.0, first_seed=10_000):
    """Those of the formulas after one epoch. Each seed has its own weights and its own order of the images."""
    rng = np.random.default_rng(first_seed)
    images = MNIST(os.environ["BNLIGHTNING_DATA_DIR"], train=True)
    x, y = images.data.reshape(-1, 784) / 255, images.targets
    nets = PlainClassifiers(norm == "custom", seeds, rng, scale)
    orders = np.stack([5000 + rng.permutation(55_000) for _ in range(seeds)])
    for batch in torch.as_tensor(orders).split(200, dim=1):
        nets.descend(x[batch], y[batch])
    return nets.accuracies(x[:5000].expand(seeds, -1, -1), y[:5000])


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "custom"])
def test_weights_and_orders_of_our_own_give_what_the_formulas_give(norm):
    """From other initial weights and orders than the replayed ones, by a rank test over seeds.

    Fixed before the first comparison was run: two-sided Mann-Whitney U, p of at least 0.005, after one epoch. The
    original's three seeds are too few for a threshold of 0.001. Their median has to lie among the formulas' seeds.
    """
    mine, plain = accuracies_of_ours(norm), accuracies_of_plain(norm, PLAIN_SEEDS)
    original = np.median([epochs[0] for epochs in accuracies(norm, 1.0).values()])
    print(norm, np.median(mine), np.median(plain), original, p_value(mine, plain))
    assert p_value(mine, plain) >= 0.005
    assert min(plain) <= original <= max(plain)


@needs_mnist
@pytest.mark.slow
def test_weights_of_twice_the_variance_are_rejected():
    slipped = accuracies_of_plain("none", len(SEEDS), scale=2.0, first_seed=20_000)
    assert p_value(slipped, accuracies_of_plain("none", PLAIN_SEEDS)) < 0.005
