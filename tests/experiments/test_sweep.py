import csv

import pytest
from omegaconf import OmegaConf

from bnlightning.experiments.sweep import override_for_runs, own_overrides, runs, swept_keys


def command(declared, *task):
    """The part of Hydra's configuration that says which runs a command asks for."""
    return OmegaConf.create({"hydra": {"sweeper": {"params": declared}, "overrides": {"task": [*task], "hydra": []}}})


def test_runs_are_every_combination_and_the_command_line_comes_first():
    config = command(
        {"model.norm": "custom,none", "model.depth": "2,3"}, "+experiment=tanh", "model.depth=7", "seed=1,2"
    )
    assert [" ".join(run) for run in runs(config)] == [
        "model.norm=custom model.depth=7 +experiment=tanh seed=1",
        "model.norm=custom model.depth=7 +experiment=tanh seed=2",
        "model.norm=none model.depth=7 +experiment=tanh seed=1",
        "model.norm=none model.depth=7 +experiment=tanh seed=2",
    ]
    assert len(runs(config, with_seeds=False)) == 2
    assert swept_keys(config) == ("model.norm", "seed")


def test_a_sweep_of_one_sweeps_nothing():
    config = command(None, "trainer.max_steps=5")
    assert len(runs(config)) == 1 and swept_keys(config) == ()


def test_what_the_command_line_gives_is_not_overridden():
    config = command(None)
    override_for_runs(config, "hydra.sweep.subdir", "'a'")
    override_for_runs(config, "hydra.sweep.subdir", "'b'")
    assert own_overrides(config) == ["hydra.sweep.subdir='a'"]


@pytest.mark.slow
def test_sweeps_are_named_by_what_they_sweep(run_module, tmp_path):
    result = run_module(
        "bnlightning.train",
        "schedule=steps,epochs",
        "trainer.max_epochs=1",
        "data.seed=3,4",
        "seed=1,2",
        "trainer.max_steps=5",
        "output_dir=out",
    )
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert names - {"comparison"} == {
        f"custom_schedule-{schedule}_data.seed-{data}_seed-{seed}"
        for schedule in ("steps", "epochs")
        for data in (3, 4)
        for seed in (1, 2)
    }
    with (tmp_path / "out" / "comparison.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["1, 2"] * 4
