import csv
import functools
import math
import re
import warnings

import lightning
import matplotlib.image
import numpy as np
import pytest
import yaml
from helpers import quiet_trainer, read_events, scalar
from torch.utils.tensorboard import SummaryWriter

from bnlightning import (
    ActivationMonitor,
    LitMovingAverage,
    LitRegressor,
    PointsDataModule,
    PredictionMonitor,
    PublishedValues,
    SyntheticRegressionDataModule,
    compare_runs,
)
from bnlightning.compare.__main__ import declared_by_sweep, main
from bnlightning.compare.figures import draw_parameter
from bnlightning.compare.figures import overview as figure
from bnlightning.compare.runs import (
    HistogramAt,
    digits,
    find_runs,
    is_higher_better,
    measured_in_tests,
    quartiles,
    read_run,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two variants, two seeds each, the first with a diverging seed."""
    root = tmp_path_factory.mktemp("finished")
    for norm in ("none", "custom"):
        for seed in (1, 2):
            lightning.seed_everything(seed, verbose=False)
            rate = 1e12 if (norm, seed) == ("none", 2) else 1e-3
            model = LitRegressor(norm=norm, activation="relu", depth=2, width=8, weight_std=0.3, learning_rate=rate)
            monitors = [ActivationMonitor(10, check_finite_every_n_steps=1), PredictionMonitor(10)]
            trainer = quiet_trainer(
                root / f"{norm}_seed-{seed}", max_steps=20, val_check_interval=5, callbacks=monitors
            )
            data = SyntheticRegressionDataModule(num_points=200, seed=seed)
            trainer.validate(model, data, verbose=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="ActivationMonitor: at step .* the first NaN")
                trainer.fit(model, data)
    return root


def test_reads_back_what_was_written(finished):
    assert [path.name for path in find_runs(finished)] == [
        "custom_seed-1", "custom_seed-2", "none_seed-1", "none_seed-2"
    ]  # fmt: skip
    run = read_run(finished / "custom_seed-2", finished)
    assert (run.variant, run.seed, run.first_nonfinite) == ("custom", 2, None)
    events = read_events(run.path)
    steps, values = run.scalars["val/loss"]
    assert steps.tolist() == [0, 5, 10, 15, 20]
    # By step: TensorBoard reads files of one second in the order of their names, 10 before 9.
    assert values.tolist() == [scalar(events, "val/loss")[step] for step in steps.tolist()]
    histogram = run.histograms["val_act_hist/net.act1"][1]
    raw = {item.step: item.histogram_value for item in events.Histograms("val_act_hist/net.act1")}[10]
    assert histogram.step == 10 and histogram.edges.tolist() == [raw.min, *raw.bucket_limit]
    assert histogram.counts.sum() == 200 * 8
    step, points = run.predictions[-1]
    data = SyntheticRegressionDataModule(num_points=200, seed=2)
    data.setup("fit")
    assert step == 20 and points.shape == (200, 3)
    np.testing.assert_array_equal(points[:, 0], data.x[:, 0])
    np.testing.assert_array_equal(points[:, 1], data.y[:, 0])
    assert np.mean((points[:, 1] - points[:, 2]) ** 2) == pytest.approx(values[-1], rel=1e-5)
    diverged = read_run(finished / "none_seed-2", finished)
    assert diverged.first_nonfinite is not None and not math.isfinite(diverged.last("val/loss"))


def test_compares_and_replaces_an_earlier_comparison(finished):
    first = compare_runs(finished)
    comparison = compare_runs(str(finished))
    assert comparison.rows == first.rows
    none, custom = comparison.rows
    assert [row["variant"] for row in comparison.rows] == ["none", "custom"] and none["seeds"] == "1, 2"
    costs = [read_run(finished / f"custom_seed-{seed}", finished).last("val/loss") for seed in (1, 2)]
    assert custom["final cost"].startswith(f"{np.median(costs):.4g} [")
    assert none["first non-finite"].endswith("(1 of 2 runs)") and custom["first non-finite"] == "none seen"
    assert len(comparison.notes) == 1 and comparison.notes[0].startswith("none (1 of 2 runs) diverged: after ")
    with (finished / "comparison.csv").open() as file:
        assert list(csv.DictReader(file)) == comparison.rows
    assert (finished / "comparison.md").read_text() == comparison.markdown
    assert comparison.markdown.splitlines()[2].startswith("| none | 1, 2 | ")
    pixels = matplotlib.image.imread(comparison.figure)
    (image,) = read_events(finished).Images("comparison")
    assert (image.height, image.width) == pixels.shape[:2]
    assert len(list(finished.glob("*.comparison"))) == 1


def test_the_figure_shows_the_runs_numbers(finished):
    runs = [read_run(path, finished) for path in find_runs(finished)]
    variants = {name: [run for run in runs if run.variant == name] for name in ("none", "custom")}
    drawn = figure.draw(variants, "val/loss", "title", ["a note"])
    costs, fits = drawn.axes[:2]
    labels = [text.get_text() for text in costs.get_legend().get_texts()]
    assert labels[1] == "custom" and labels[0] == "none (1 of 2 seeds diverged)"
    line = next(line for line in costs.get_lines() if line.get_label() == "custom")
    expected = np.median([run.scalars["val/loss"][1] for run in variants["custom"]], axis=0)
    np.testing.assert_allclose(line.get_ydata(), expected)
    fit = next(line for line in fits.get_lines() if line.get_label() == "custom")
    points = variants["custom"][0].predictions[-1][1]
    np.testing.assert_allclose(np.sort(fit.get_ydata()), np.sort(points[:, 2]))
    cells = [axes.get_title() for axes in drawn.axes if axes.get_title().startswith("net.")]
    assert [cell.partition("\n")[0] for cell in cells] == ["net.act1", "net.act2"] * 2
    assert any("a note" in text.get_text() for text in drawn.texts)


@pytest.mark.parametrize(
    ("names", "title", "labels"),
    [
        (["custom_rate-1e-3", "custom_rate-1e-4"], "custom_rate", ["1e-3", "1e-4"]),
        (["custom_a-x_rate-1", "custom_a-x_rate-2"], "custom_a-x_rate", ["1", "2"]),
        (["custom_rate-1", "none_rate-1"], "", ["custom_rate-1", "none_rate-1"]),
        (["custom_rate-1"], "", ["custom_rate-1"]),
    ],
)
def test_the_legend_names_what_tells_variants_apart(names, title, labels, finished):
    runs = [read_run(finished / "custom_seed-1", finished)]
    costs, fits = figure.draw(dict.fromkeys(names, runs), "val/loss", "title", []).axes[:2]
    for legend, also in ((costs.get_legend(), []), (fits.get_legend(), ["data"])):
        assert legend.get_title().get_text() == title
        assert [text.get_text() for text in legend.get_texts()] == [*also, *labels]


def test_many_variants_are_drawn_differently():
    variants = {f"custom_rate-{rate}": [] for rate in range(8)}
    colors = {figure.style(name, variants)[0] for name in variants}
    own = {figure.style(name, variants)[0] for name in ("none", "custom", "torch")}
    assert len(colors | own) == 11


def test_a_variant_that_diverged_is_marked_where_it_did(finished):
    diverged = [read_run(finished / "none_seed-2", finished)]
    costs = figure.draw({"none": diverged}, "val/loss", "title", []).axes[0]
    step = diverged[0].first_nonfinite[0]
    (label,) = (text.get_text() for text in costs.get_legend().get_texts())
    assert label.startswith(f"none diverged (×): NaN or infinite from step {step} on")
    assert [line.get_xdata() for line in costs.get_lines() if line.get_marker() == "x"] == [[step]]


def test_a_diverged_seed_counts_as_infinite():
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [1.75, 2.5, 3.25]
    low, middle, high = quartiles(np.array([1.0, np.nan, 3.0, np.inf, 2.0]))
    assert (low, middle, high) == (2.0, 3.0, np.inf)


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


def test_other_peoples_runs_need_nothing_but_a_scalar(tmp_path):
    for name, offset in (("small", 0.0), ("large", 1.0)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step in range(5):
                writer.add_scalar("loss", offset + 1 / (step + 1), step)
    with pytest.raises(ValueError, match=r"metric='val/loss' was logged by no run in .*: choose one of loss"):
        compare_runs(tmp_path)
    comparison = compare_runs(tmp_path, metric="loss")
    assert [(row["variant"], row["final cost"], row["seeds"]) for row in comparison.rows] == [
        ("large", "1.2", "1 run"),
        ("small", "0.2", "1 run"),
    ]
    assert comparison.figure.stat().st_size > 10_000


def test_several_trainings_in_one_directory_are_told(tmp_path):
    for _ in range(2):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(3):
                writer.add_scalar("val/loss", 1.0, step)
    with pytest.warns(UserWarning, match="holds several trainings"):
        compare_runs(tmp_path)


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
    assert [row["variant"] for row in comparison.rows] == ["a [b]/custom", "a [b]/none"]
    assert all(row["dead"].endswith("%") for row in comparison.rows)
    drawn = figure.draw({run.variant: [run] for run in comparison.runs}, "train/loss", "title", [])
    cells = [axes.get_title().partition("\n")[0] for axes in drawn.axes if axes.get_title().startswith("net.")]
    assert cells == ["net.act1", "net.act2"] * 2


def test_every_variant_has_a_style_of_its_own():
    variants = {name: [] for name in ["none", "custom", "torch", *map(str, range(12))]}
    styles = [figure.style(name, variants) for name in variants]
    assert len(set(styles)) == len(styles)


def test_a_strange_hparams_file_tells_no_seed(tmp_path):
    for name, text in (("a", ""), ("b", "- 1"), ("c", "!!python/object/apply:os.getcwd []"), ("d", "seed: 3")):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("val/loss", 1.0, 0)
        (tmp_path / name / "hparams.yaml").write_text(text)
    assert [read_run(tmp_path / name, tmp_path).seed for name in "abcd"] == [None, None, None, 3]


@pytest.fixture(scope="module")
def with_tests(tmp_path_factory):
    """Two variants whose tests measured something, beside what was published."""
    root = tmp_path_factory.mktemp("with_tests")
    for convention in ("keras", "pytorch"):
        options = {"convention": convention, "eps": 1e-3, "momentum": 0.5, "backend": "reference"}
        model, data = LitMovingAverage(norm_options=options), PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
        published = PublishedValues({"running_var": 0.74709475, "running_mean": 0.3514931, "loss": 0.5})
        monitors = [published, PredictionMonitor(), ActivationMonitor()]
        trainer = quiet_trainer(root / convention, max_steps=1, limit_val_batches=1, callbacks=monitors)
        trainer.fit(model, data)
        trainer.validate(model, data, verbose=False)
        trainer.test(model, data, verbose=False)
    return root


def test_what_the_tests_measured_is_a_table_beside_what_was_published(with_tests, capsys):
    comparison = compare_runs(with_tests)
    results = {row["test metric"]: row for row in comparison.results}
    assert results["running_var"] == {
        "test metric": "running_var",
        "published": "0.74709475",
        "keras": "0.74709475",
        "pytorch": "0.99418956",
    }
    assert results["running_mean"]["pytorch"] == results["running_mean"]["published"] == "0.3514931"
    assert results["scale"]["published"] == "-" and results["loss"]["keras"] == "-"
    marked = [line for line in comparison.markdown.splitlines() if "≠" in line]
    assert marked == ["| running_var | 0.74709475 | 0.74709475 | ≠ 0.99418956 |"]
    assert [note.partition(" = ")[0] for note in comparison.notes] == [
        "keras: running variance 0.7470948",
        "pytorch: running variance 0.9941896",
    ]
    comparison.print()
    assert "≠ 0.99418956" in (printed := capsys.readouterr().out) and all(note in printed for note in comparison.notes)
    with (with_tests / "comparison.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["published", "keras", "pytorch"]
    assert rows["published"]["final cost"] == "-" and rows["published"]["test/running_var"] == "0.74709475"
    assert rows["pytorch"]["test/running_var"] == "0.99418956" and rows["keras"]["test/loss"] == "-"


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


def write_run(directory, hparams=None, nonfinite_at=None, **tags):
    """A run's event file and ``hparams.yaml``; of a tag values by step, ``__`` in its name for a slash."""
    with SummaryWriter(str(directory)) as writer:
        for tag, values in tags.items():
            for step, value in values.items():
                writer.add_scalar(tag.replace("__", "/"), value, step)
        if nonfinite_at is not None:
            writer.add_text("health/first_nonfinite_layer", "net.act1", nonfinite_at)
    if hparams is not None:
        (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams))


def test_of_accuracies_the_higher_is_the_better(tmp_path):
    for seed, last in enumerate([0.9, 0.8, math.nan]):
        write_run(tmp_path / f"run_seed-{seed}", val__acc={0: 0.01, 10: 0.5, 20: last})
    comparison = compare_runs(tmp_path, metric="val/acc")
    (row,) = comparison.rows
    assert "final cost" not in row and row["val/acc"].startswith("0.8 [")
    drawn = figure.draw({"run": comparison.runs}, "val/acc", "title", [])
    axes = next(axes for axes in drawn.axes if axes.get_title(loc="left").startswith("Validation accuracy"))
    assert axes.get_yscale() == "linear" and axes.get_lines()[0].get_ydata()[-1] == pytest.approx(0.8)
    low, high = axes.get_ylim()
    # From the first evaluation of a trained network on.
    assert 0.45 < low < 0.5 and 0.8 < high < 1.0


def test_tests_without_publications_stand_in_the_first_table_and_empty_columns_nowhere(tmp_path):
    for name, value in (("a", 0.912345678), ("b", 0.5)):
        write_run(tmp_path / name, val__acc={0: 0.1, 10: 0.5, 20: value}, test__acc={20: value})
    comparison = compare_runs(tmp_path, metric="val/acc")
    lines = comparison.markdown.splitlines()
    assert lines[0] == "| variant | seeds | val/acc | seconds | test/acc |" and len(lines) == 4
    assert lines[2].endswith(" | 0.9123 |") and lines[3].endswith(" | 0.5 |")
    assert comparison.results == [{"test metric": "acc", "a": "0.9123457", "b": "0.5"}]
    # Its dots would say nothing beside the curves.
    drawn = figure.draw({run.variant: [run] for run in comparison.runs}, "val/acc", "title", [])
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["Validation accuracy"]


def test_an_accuracy_of_runs_that_diverged_is_marked(tmp_path):
    write_run(tmp_path / "run", nonfinite_at=7, val__acc={0: 0.1, 10: 0.098, 20: 0.098})
    comparison = compare_runs(tmp_path, metric="val/acc")
    assert "diverged: after 7 training steps" in comparison.notes[0] and " - " not in comparison.notes[0]
    axes = figure.draw({"run": comparison.runs}, "val/acc", "title", []).axes[0]
    assert [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "x"] == [[7]]
    assert "NaN or infinite from step 7 on" in axes.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(
    ("metric", "is_higher"),
    [("val/acc", True), ("test/accuracy", True), ("acc_top5", True), ("val/loss", False), ("accumulated", False)],
)
def test_metrics_are_known_by_their_names(metric, is_higher):
    assert is_higher_better(metric) == is_higher


def test_a_published_curve_is_compared_step_by_step(tmp_path, capsys):
    published = {10: 0.5, 20: 0.6123, 30: 0.7}
    write_run(tmp_path / "a", published__val__acc=published, val__acc={0: 0.1, 10: 0.5, 20: 0.6125, 30: 0.65})
    # Stopped early.
    write_run(tmp_path / "b", published__val__acc={10: 0.5}, val__acc={0: 0.1, 10: 0.5})
    comparison = compare_runs(tmp_path, metric="val/acc")
    assert comparison.curve == [
        {"step": "10", "published": "0.5000", "a": "0.5000", "b": "0.5000"},
        {"step": "20", "published": "0.6123", "a": "0.6125", "b": "-"},
        {"step": "30", "published": "0.7000", "a": "0.6500", "b": "-"},
    ]
    assert comparison.results == []
    assert "| 20 | 0.6123 | 0.6125 (+0.0002) | - |" in (tmp_path / "comparison.md").read_text()
    assert comparison.notes == [
        "a: of 3 values of val/acc, 1 is exactly the published one; the largest difference is 0.0500, at step 30.",
        "b: of 1 values of val/acc, 1 is exactly the published one.",
    ]
    comparison.print()
    assert "0.6500 (-0.0500)" in capsys.readouterr().out
    with (tmp_path / "comparison_curve.csv").open() as file:
        assert list(csv.DictReader(file)) == comparison.curve
    axes = figure.draw({run.variant: [run] for run in comparison.runs}, "val/acc", "title", []).axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "published"]
    assert line.get_color() == "black" and line.get_linestyle() == "--"
    assert line.get_xdata().tolist() == [10, 20, 30]
    np.testing.assert_allclose(line.get_ydata(), [*published.values()], rtol=1e-6)
    # Nothing of it is left where the next comparison has none.
    write_run(tmp_path / "a", val__loss={0: 1.0})
    assert compare_runs(tmp_path).curve == [] and not (tmp_path / "comparison_curve.csv").exists()


def test_variants_with_publications_of_their_own_are_compared_with_those(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.25)):
        write_run(tmp_path / name, published__val__acc={10: value}, val__acc={0: 0.1, 10: 0.5})
    comparison = compare_runs(tmp_path, metric="val/acc")
    row = {"step": "10", "published (a)": "0.5000", "a": "0.5000", "published (b)": "0.2500", "b": "0.5000"}
    assert comparison.curve == [row]
    assert "| 10 | 0.5000 | 0.5000 | 0.2500 | 0.5000 (+0.2500) |" in comparison.markdown


def test_hyperparameters_are_read_back(finished, tmp_path):
    run = read_run(finished / "custom_seed-2", finished)
    assert run.hparam("norm") == "custom" and run.hparam("weight_std") == 0.3 and run.hparams["depth"] == 2
    write_run(tmp_path, {"norm": "none", "norm_options": {"momentum": 0.9}}, val__loss={0: 1.0})
    nested = read_run(tmp_path, tmp_path)
    assert nested.hparam("norm_options.momentum") == 0.9
    with pytest.raises(ValueError, match=r"'depth' is no hyperparameter .*: choose one of norm, norm_options.momentum"):
        nested.hparam("depth")


def test_variants_are_sorted_by_their_numbers(tmp_path):
    for name in ("custom_rate-10", "custom_rate-2", "none_rate-1", "custom_rate-1e-05", "custom_rate-0.001"):
        write_run(tmp_path / name, val__loss={0: 1.0})
    variants = [row["variant"] for row in compare_runs(tmp_path).rows]
    assert variants[0] == "none_rate-1"
    assert [name.partition("-")[2] for name in variants[1:]] == ["1e-05", "0.001", "2", "10"]


def test_a_figure_of_ones_own_replaces_the_default_one(finished):
    called = []

    def draw(variants, metric, title, notes):
        called.append(([*variants], metric, title, len(notes)))
        return figure.Figure(figsize=(3.0, 2.0), dpi=100)

    comparison = compare_runs(finished, draw=draw)
    assert called == [(["none", "custom"], "val/loss", finished.name, 1)]
    assert matplotlib.image.imread(comparison.figure).shape[:2] == (200, 300)


def sweep_configuration(parameter, target="bnlightning.compare.figures.draw_parameter"):
    draw = {"_target_": target, "_partial_": True, "parameter": parameter}
    compare = {"_target_": "bnlightning.experiments.CompareRuns", "metric": "train/loss", "draw": draw}
    return yaml.safe_dump({"hydra": {"callbacks": {"other": None, "mine": compare}}})


def test_the_command_line_compares_as_the_sweep_does(tmp_path, capsys):
    for rate in (0.1, 1.0):
        write_run(tmp_path / str(rate), {"norm": "none", "rate": rate}, train__loss={0: 1.0, 5: rate})
    expected = compare_runs(tmp_path, "train/loss", functools.partial(draw_parameter, parameter="rate"))
    pixels = matplotlib.image.imread(expected.figure)
    compare_runs(tmp_path, "train/loss")
    assert matplotlib.image.imread(expected.figure).shape != pixels.shape
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rate"))
    main([str(tmp_path)])
    np.testing.assert_array_equal(matplotlib.image.imread(expected.figure), pixels)
    # What the figure cannot show is shown by the default one.
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rates"))
    main([str(tmp_path)])
    assert matplotlib.image.imread(expected.figure).shape != pixels.shape
    assert "since the sweep's own cannot be drawn: 'rates' is no hyperparameter" in capsys.readouterr().err
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rate", "nobody.knows"))
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert re.search(r"draw='nobody.knows' of .*multirun.yaml is not found here", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "- 1", "hydra: 1", "hydra: {callbacks: null}", "!!python/name:os.getcwd", "a: ["])
def test_a_strange_sweep_configuration_declares_nothing(text, tmp_path):
    (tmp_path / "multirun.yaml").write_text(text)
    assert declared_by_sweep(tmp_path) == ("val/loss", None)


def test_several_seeds_give_a_median_or_what_all_of_them_gave(tmp_path):
    for seed, (changing, diverging) in enumerate([(1.0, 1.0), (2.0, math.nan), (4.0, math.inf)]):
        with SummaryWriter(str(tmp_path / f"run_seed-{seed}")) as writer:
            for tag, value in (("val/loss", 1.0), ("test/a", changing), ("test/b", 1 / 3), ("test/c", diverging)):
                writer.add_scalar(tag, value, 0)
    comparison = compare_runs(tmp_path)
    assert [row["run"] for row in comparison.results] == ["2 [1.5, 3]", "0.33333334", "inf [1, inf]"]
    assert list(measured_in_tests({"run": comparison.runs})) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (-0.0009999976, "-0.001"),
        (0.0, "0"),
        (1.2157849, "1.2157849"),
        (1e-12, "1.e-12"),
        (math.nan, "nan"),
    ],
)
def test_digits_are_those_numpy_prints(value, text):
    assert digits(value) == text


@pytest.mark.parametrize(
    ("values", "scale"), [([0.1, 1.0, -2.0], "linear"), ([0.9, 0.8, 1e4], "symlog"), ([], "linear")]
)
def test_metrics_of_other_magnitudes_share_an_axis(values, scale):
    axes = figure.Figure().add_subplot()
    figure._set_value_scale(axes, values)
    assert axes.get_xscale() == scale


def test_the_command_line(finished, capsys, tmp_path):
    main([str(finished)])
    output = capsys.readouterr().out
    assert f"Figure: {finished / 'comparison.png'}" in output and f"tensorboard --logdir {finished}" in output
    with pytest.raises(SystemExit) as failure:
        main([str(tmp_path)])
    assert failure.value.code == 1
    assert "holds no TensorBoard files of a run" in capsys.readouterr().err
