import re
from pathlib import Path

import hydra
import pytest

from bnlightning import CONF_DIR
from bnlightning.experiments.listing import Experiment, find_experiments

ROOT = Path(__file__).parents[2]


def write_experiment(directory, name, text):
    (directory / "experiment").mkdir(parents=True, exist_ok=True)
    (directory / "experiment" / f"{name}.yaml").write_text(text)


def test_an_experiments_file_describes_it(tmp_path):
    write_experiment(tmp_path, "b", "# @package _global_\n# Data: MNIST\n# What it\n# shows.\nseed: 1\n# Not this.\n")
    write_experiment(tmp_path, "a", "# @package _global_\n# One thing: another.\nseed: 1\n")
    write_experiment(tmp_path, "c", "seed: 1\n")
    assert find_experiments([tmp_path]) == [
        Experiment("a", "One thing: another", False),
        Experiment("b", "What it shows", True),
        Experiment("c", "", False),
    ]
    assert find_experiments([tmp_path / "without"]) == []


def test_of_one_name_the_first_counts(tmp_path):
    write_experiment(tmp_path, "tanh", "# Mine.\n")
    found = {experiment.name: experiment.sentence for experiment in find_experiments([tmp_path, CONF_DIR])}
    assert found["tanh"] == "Mine" and found["relu"] == {e.name: e.sentence for e in find_experiments()}["relu"]


@pytest.mark.parametrize("experiment", find_experiments(), ids=lambda experiment: experiment.name)
def test_every_experiment_says_what_it_shows_and_what_it_needs(experiment):
    assert re.fullmatch(r"[A-Z0-9].*[^.]", experiment.sentence)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("train", [f"+experiment={experiment.name}"])
    assert experiment.needs_mnist == (config.data._target_ == "bnlightning.MNISTDataModule")


def test_the_documentation_has_every_experiment_with_its_sentence():
    page = ROOT / "docs" / "experiments.md"
    text = (page if page.is_file() else ROOT / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\+experiment=(\w+)`? *\| *(.*?) *\|", text, re.MULTILINE)
    assert sorted(rows) == [(experiment.name, experiment.sentence) for experiment in find_experiments()]


@pytest.mark.slow
def test_help_lists_the_experiments_and_the_values_people_change(run_module, tmp_path):
    write_experiment(tmp_path / "conf", "mine", "# @package _global_\n# A net of $5.\nseed: 2\n")
    result = run_module("bnlightning.train", "--config-dir=conf", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert "+experiment=mine A net of $5 +experiment=moving_average One step" in text
    experiments = find_experiments()
    places = {e.name: text.index(f"+experiment={e.name} {e.sentence}") for e in experiments}
    on_mnist = text.index("On MNIST, which is downloaded")
    assert {name for name, place in places.items() if place > on_mnist} == {
        e.name for e in experiments if e.needs_mnist
    }
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
