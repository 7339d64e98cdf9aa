import csv

import pytest


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
