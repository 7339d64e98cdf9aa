import itertools
import math

import numpy as np
import pytest
from helpers import quiet_trainer
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from bnlightning import ActivationMonitor, LitRegressor, SyntheticRegressionDataModule, compare_runs
from bnlightning.compare.figures import overview as figure
from bnlightning.compare.runs import HistogramAt, find_runs, read_run


def test_the_figure_shows_the_runs_numbers(finished):
    runs = [read_run(path, finished) for path in find_runs(finished)]
    variants = {name: [run for run in runs if run.variant == name] for name in ("none", "custom")}
    drawn = figure.draw(variants, "val/loss", "title", ["a note"])
    costs, fits = drawn.axes[:2]
    labels = [text.get_text() for text in costs.get_legend().get_texts()]
    assert labels[1] == "batch norm (ours)" and labels[0] == "no norm (1 of 2 seeds diverged)"
    line = next(line for line in costs.get_lines() if line.get_label() == "batch norm (ours)")
    expected = np.median([run.scalars["val/loss"][1] for run in variants["custom"]], axis=0)
    np.testing.assert_allclose(line.get_ydata(), expected)
    fit = next(line for line in fits.get_lines() if line.get_label() == "batch norm (ours)")
    points = variants["custom"][0].predictions[-1][1]
    np.testing.assert_allclose(np.sort(fit.get_ydata()), np.sort(points[:, 2]))
    cells = [axes.get_title() for axes in drawn.axes if axes.get_title().startswith("net.")]
    assert [cell.partition("\n")[0] for cell in cells] == ["net.act1", "net.act2"] * 2
    assert any("a note" in text.get_text() for text in drawn.texts)
    rows = {text.get_text() for axes in drawn.axes for text in axes.texts}
    assert {"no norm", "batch norm (ours)"} <= rows


def test_the_legends_title_has_what_the_variants_share(finished):
    runs = [read_run(finished / "custom_seed-1", finished)]
    variants = dict.fromkeys(["custom_rate-1e-3", "custom_rate-1e-4"], runs)
    costs, fits = figure.draw(variants, "val/loss", "title", []).axes[:2]
    for legend, also in ((costs.get_legend(), []), (fits.get_legend(), ["data"])):
        assert legend.get_title().get_text() == "batch norm (ours), rate"
        assert [text.get_text() for text in legend.get_texts()] == [*also, "1e-3", "1e-4"]


def test_a_variant_that_diverged_is_marked_where_it_did(finished):
    diverged = [read_run(finished / "none_seed-2", finished)]
    costs = figure.draw({"none": diverged}, "val/loss", "title", []).axes[0]
    step = diverged[0].first_nonfinite[0]
    (label,) = (text.get_text() for text in costs.get_legend().get_texts())
    assert label.startswith(f"no norm diverged (×): NaN or infinite from step {step} on")
    assert [line.get_xdata() for line in costs.get_lines() if line.get_marker() == "x"] == [[step]]


def test_rebinning_keeps_the_counts():
    histogram = HistogramAt(0, np.array([-1.0, -0.5, 0.0, 1.0]), np.array([10.0, 0.0, 30.0]))
    edges, counts = figure._rebin(histogram, -1.0, 1.0)
    assert counts.sum() == pytest.approx(40) and counts[edges[:-1] >= 0].sum() == pytest.approx(30)


@pytest.mark.parametrize(
    ("histogram", "words"),
    [
        (None, "NaN"),
        (HistogramAt(0, np.array([-1e-6, 1e-6]), np.array([5.0])), "all 0"),
        (HistogramAt(0, np.array([0.0, 1.0]), np.array([5.0])), ""),
        (HistogramAt(0, np.array([0.0, 1e9]), np.array([5.0])), "up to 1e+09"),
    ],
)
def test_says_in_words_what_a_ridge_would_not_show(histogram, words):
    assert figure._in_words(histogram, 0.0, 1.0) == words


@pytest.mark.parametrize(
    "values",
    [[-3.0, -2.0, -1.0], [-1.0, 0.0, 5.0], [0.0, 0.5, 0.9], [0.0, 0.0, 0.0], [math.nan] * 3, [1e-30, 1e30, 1.0]],
)
def test_costs_of_any_sign_are_drawn(tmp_path, values):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("val/loss", value, step)
    run = read_run(tmp_path / "run", tmp_path)
    axes = figure.draw({"run": [run]}, "val/loss", "title", []).axes[0]
    low, high = axes.get_ylim()
    assert low < high
    shown = [value for value in axes.get_lines()[0].get_ydata() if low <= value <= high]
    assert len(shown) >= np.isfinite(values).sum() - 1
    compare_runs(tmp_path)


def test_layers_that_one_variant_lacks_and_names_with_brackets(tmp_path, capsys):
    for norm in ("none", "custom"):
        monitors = [ActivationMonitor()]
        trainer = quiet_trainer(tmp_path / "a [b]" / norm, max_steps=2, callbacks=monitors, limit_val_batches=0)
        trainer.fit(LitRegressor(norm=norm, depth=2), SyntheticRegressionDataModule())
    comparison = compare_runs(tmp_path, metric="train/loss")
    comparison.print()
    assert str(tmp_path / "comparison.png") in capsys.readouterr().out
    assert [row["variant"] for row in comparison.rows] == ["a [b]/batch norm (ours)", "a [b]/no norm"]
    assert all(row["dead"].endswith("%") for row in comparison.rows)
    drawn = figure.draw({run.variant: [run] for run in comparison.runs}, "train/loss", "title", [])
    cells = [axes.get_title().partition("\n")[0] for axes in drawn.axes if axes.get_title().startswith("net.")]
    assert cells == ["net.act1", "net.act2"] * 2


def test_the_figure_shows_what_the_tests_measured(with_tests):
    variants = {name: [read_run(with_tests / name, with_tests)] for name in ("keras", "pytorch")}
    drawn = figure.draw(variants, "val/loss", "title", [])
    dots, table = drawn.axes[:2]
    metrics = [label.get_text() for label in dots.get_yticklabels()]
    row = metrics.index("running_var")
    drawn_at = [line.get_xdata()[0] for line in dots.get_lines() if abs(line.get_ydata()[0] - row) < 0.3]
    assert drawn_at == pytest.approx([0.74709475, 0.74709475, 0.99418956])
    bold = {text.get_text() for text in table.texts if text.get_weight() == "bold"}
    assert bold == {"published", "keras", "pytorch", "0.99418956"}
    # Both fits lie below both points: the axis holds them all the same.
    fits = next(axes for axes in drawn.axes if axes.get_title(loc="left") == "Data and fit after 1 step")
    low, high = fits.get_ylim()
    assert low < min(line.get_ydata().min() for line in fits.get_lines()) < 3 < 4 < high
    # Two values have no distribution.
    assert not [axes for axes in drawn.axes if axes.get_title().startswith("net.")]


@pytest.mark.parametrize(
    ("evaluations", "measured", "has_curve"), [(2, True, False), (3, True, True), (2, False, True)]
)
def test_two_evaluations_are_no_curve_beside_what_the_tests_measured(evaluations, measured, has_curve, tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(evaluations):
            writer.add_scalar("val/loss", 1.0 + step, step)
        if measured:
            writer.add_scalar("test/acc", 0.5, evaluations)
    comparison = compare_runs(tmp_path)
    drawn = figure.draw({"run": comparison.runs}, "val/loss", "title", [])
    assert ("Cost" in [axes.get_title(loc="left") for axes in drawn.axes]) == has_curve
    # Nobody looked for values that are not finite.
    assert comparison.rows[0]["first non-finite"] == "-"


def test_an_accuracy_of_runs_that_diverged_is_marked(tmp_path, write_run):
    write_run(tmp_path / "run", nonfinite_at=7, val__acc={0: 0.1, 10: 0.098, 20: 0.098})
    comparison = compare_runs(tmp_path, metric="val/acc")
    assert "diverged: after 7 training steps" in comparison.notes[0] and " - " not in comparison.notes[0]
    axes = figure.draw({"run": comparison.runs}, "val/acc", "title", []).axes[0]
    assert [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "x"] == [[7]]
    assert "NaN or infinite from step 7 on" in axes.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(
    ("values", "scale"), [([0.1, 1.0, -2.0], "linear"), ([0.9, 0.8, 1e4], "symlog"), ([], "linear")]
)
def test_metrics_of_other_magnitudes_share_an_axis(values, scale):
    axes = Figure().add_subplot()
    figure._set_value_scale(axes, values)
    assert axes.get_xscale() == scale


@pytest.mark.parametrize("settings", [[""], ["_activation-leaky_relu", "_activation-tanh"]])
def test_the_headings_of_test_metrics_do_not_overlap(settings, tmp_path, write_run, read_variants):
    for norm in ("none", "custom", "torch"):
        for setting in settings:
            write_run(tmp_path / f"{norm}{setting}", val__loss=[1.0], published__acc=[0.5], test__acc=[0.5])
    drawn = figure.draw(read_variants(tmp_path), "val/loss", "title", [])
    drawn.draw_without_rendering()
    headings = [text for axes in drawn.axes for text in axes.texts if text.get_weight() == "bold"]
    assert headings[0].get_text() == "published" and len(headings) == 1 + 3 * len(settings)
    boxes = [text.get_window_extent() for text in headings]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert all(box.y1 < drawn.bbox.y1 and box.x1 < drawn.bbox.x1 for box in boxes)
