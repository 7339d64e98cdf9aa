"""The experiments against what the original systems gave, over seeds 1 to 10."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from bnlightning.compare.runs import find_runs, quartiles, read_run

REFERENCE = Path(__file__).parents[1] / "reference"
SEEDS = range(1, 11)
STATISTICS = {
    "tanh": "batch",
    "relu": "batch",
    "sigmoid": "batch",
    "tanh_full_batch": "running",
    "relu_full_batch": "running",
}

# Quartiles of the cost over 20 seeds of the mini-batch systems, after so many steps.
PUBLISHED_COSTS = {
    ("relu", "custom"): {0: (1131, 1236), 50: (96, 134), 100: (89, 112), 200: (90, 110), 250: (84, 106)},
    ("tanh", "none"): {0: (1071, 1291), 50: (864, 915), 100: (675, 871), 200: (601, 729), 250: (606, 708)},
    ("tanh", "custom"): {0: (1154, 1308), 50: (312, 361), 100: (231, 253), 200: (157, 195), 250: (143, 187)},
    ("sigmoid", "none"): {0: (1165, 1331), 50: (737, 756), 100: (685, 736), 200: (480, 608), 250: (418, 522)},
    ("sigmoid", "custom"): {0: (1137, 1267), 50: (512, 568), 100: (360, 393), 200: (236, 262), 250: (208, 225)},
}


def is_inside(value, low, high, least=0.0):
    """Whether a median lies inside quartiles widened on each side by half their distance, at least by ``least``."""
    margin = max((high - low) / 2, least)
    return low - margin <= value <= high + margin


def reference(name, experiment, norm):
    with (REFERENCE / name).open() as file:
        return [
            row
            for row in csv.DictReader(file)
            if (row["experiment"], row["norm"], row["eval_statistics"]) == (experiment, norm, STATISTICS[experiment])
        ]


def comparisons(runs, experiment, norm):
    """Every compared number: what it is, our median, the reference's quartiles, the least margin."""
    diverges = experiment.startswith("relu") and norm == "none"
    rows = reference("costs.csv", experiment, norm)
    for step in [0] if diverges else [0, 50, 100, 200, 250]:
        quartiles = np.quantile([float(row[f"step{step}"]) for row in rows], [0.25, 0.75])
        yield f"cost after {step}", np.median([at(run, "val/loss", step) for run in runs]), quartiles, 0.0
    fractions = defaultdict(list)
    for row in reference("layers.csv", experiment, norm):
        for key in ("saturated", "zero", "dead"):
            # After the first step the reference's zeros of the diverged net are NaN that an old relu made zero.
            if row[key] and not (diverges and int(row["step"]) > 0):
                fractions[int(row["step"]), int(row["layer"]), key].append(float(row[key]))
    for (step, layer, key), values in fractions.items():
        median = np.median([at(run, f"layer_val_{key}/net.act{layer}", step) for run in runs])
        yield f"{key} in layer {layer} after {step}", median, np.quantile(values, [0.25, 0.75]), 0.02


def readme_row(runs, experiment, norm, inside):
    """The variant's row of README's table."""
    cells = [f"`{experiment}`", norm]
    for step in (50, 250):
        original = [float(row[f"step{step}"]) for row in reference("costs.csv", experiment, norm)]
        for costs in (original, [at(run, "val/loss", step) for run in runs]):
            low, median, high = quartiles(np.array(costs))
            cells.append(f"{median:.4g} [{low:.4g}, {high:.4g}]" if np.isfinite(median) else "inf or NaN")
    return f"| {' | '.join([*cells, inside])} |"


def at(run, tag, step):
    steps, values = run.scalars[tag]
    return values[steps.tolist().index(step)]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", STATISTICS)
def test_medians_lie_inside_the_references_quartiles(experiment, run_module, tmp_path):
    seeds = ",".join(map(str, SEEDS))
    result = run_module("bnlightning.train", f"+experiment={experiment}", f"seed={seeds}", "output_dir=out")
    assert result.returncode == 0, result.stderr
    runs = [read_run(path, tmp_path / "out") for path in find_runs(tmp_path / "out")]
    outside = []
    number = 0
    rows = []
    for norm in ("none", "custom"):
        variant = [run for run in runs if run.variant == norm]
        assert sorted(run.seed for run in variant) == list(SEEDS)
        compared = list(comparisons(variant, experiment, norm))
        number += len(compared)
        inside = sum(is_inside(median, low, high, least) for _, median, (low, high), least in compared)
        rows.append(readme_row(variant, experiment, norm, f"{inside} of {len(compared)}"))
        for what, median, (low, high), least in compared:
            if not is_inside(median, low, high, least):
                outside.append(f"{norm}: {what}: {median:.4g} outside [{low:.4g}, {high:.4g}]")
        for step, (low, high) in PUBLISHED_COSTS.get((experiment, norm), {}).items():
            median = np.median([at(run, "val/loss", step) for run in variant])
            # By the whole distance here: another processor rounds otherwise, and so trains another ten nets.
            assert is_inside(median, low, high, least=high - low), (norm, step, median, low, high)
        if experiment.startswith("relu") and norm == "none":
            assert all(run.first_nonfinite[0] == 1 for run in variant)
            assert all(at(run, "layer_val_nonfinite/net.act7", step) == 1.0 for run in variant for step in (50, 250))
    print(*rows, sep="\n")
    print(f"{experiment}: {number - len(outside)} of {number} inside", *outside, sep="\n  ")
    # Two medians of ten seeds each, from different initial weights: with hundreds of them compared, a few differ by
    # chance by more than this, and which ones changes with the seeds and the processor. That the test can fail: tanh
    # nets whose weights are drawn with 0.8 times the standard deviation have 33 of 262 outside.
    assert len(outside) <= 0.06 * number, outside
