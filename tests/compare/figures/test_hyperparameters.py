import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from bnlightning.compare.figures import draw_panels, draw_parameter


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def points(axes):
    """The lines' points, by their labels."""
    lines = [bars.lines[0] for bars in axes.containers]
    return dict(zip(legend(axes), [line.get_xydata() for line in lines], strict=True))


def crosses(axes):
    return sorted(
        (float(line.get_xdata()[0]), line.get_color()) for line in axes.get_lines() if line.get_marker() == "x"
    )


def test_results_stand_over_the_parameter(sweep):
    drawn = draw_parameter(sweep, "val/loss", "rates", [], parameter="learning_rate")
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "learning rate (learning_rate)"
    assert legend(axes) == ["no norm", "batch norm (ours)"]
    assert drawn.texts[0].get_text().startswith("rates: validation loss after training, by learning rate (median")
    for norm, label in (("none", "no norm"), ("custom", "batch norm (ours)")):
        drawn_points = points(axes)[label]
        assert drawn_points[:, 0].tolist() == [1e-4, 1e-3, 1e12]
        for rate, shown in drawn_points[:2]:
            runs = next(
                runs
                for runs in sweep.values()
                if (runs[0].hparam("norm"), runs[0].hparam("learning_rate")) == (norm, rate)
            )
            assert shown == pytest.approx(np.median([run.scalars["val/loss"][1][-1] for run in runs]))
    none, custom = (bars.lines[0].get_color() for bars in axes.containers)
    assert (1e12, none) in crosses(axes) and (1e-3, none) not in crosses(axes) and (1e-3, custom) not in crosses(axes)
    assert math.isnan(points(axes)["no norm"][-1, 1])


def test_the_seeds_that_diverged_are_counted_and_are_the_worst(tmp_path, write_run, read_variants):
    # The accuracy of one that diverged is finite, and above the others'.
    for seed, (last, nonfinite_at) in enumerate([(0.6, None), (0.5, None), (0.9, 3)]):
        write_run(tmp_path / f"a_seed-{seed}", {"norm": "none", "rate": 1.0}, nonfinite_at, val__acc=[0.1, last])
    for seed in range(3):
        write_run(tmp_path / f"b_seed-{seed}", {"norm": "none", "rate": 2.0}, val__acc=[0.1, 0.7])
    (axes,) = draw_parameter(read_variants(tmp_path), "val/acc", "", [], parameter="rate").axes
    np.testing.assert_allclose(points(axes)["no norm"], [[1.0, 0.5], [2.0, 0.7]], rtol=1e-6)
    assert [x for x, _ in crosses(axes)] == [1.0] and "1 of 3" in [text.get_text() for text in axes.texts]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[1] < 1.0


def test_without_a_monitor_the_training_loss_tells_that_a_run_diverged(tmp_path, write_run, read_variants):
    write_run(tmp_path / "a", {"norm": "none", "rate": 1.0}, val__acc=[0.1, 0.1], train__loss=[1.0, math.nan])
    write_run(tmp_path / "b", {"norm": "none", "rate": 2.0}, val__acc=[0.1, 0.7], train__loss=[1.0, 0.5])
    (axes,) = draw_parameter(read_variants(tmp_path), "val/acc", "", [], parameter="rate").axes
    assert [x for x, _ in crosses(axes)] == [1.0]


def test_a_run_without_the_metric_has_no_part_in_the_median(tmp_path, write_run, read_variants):
    for seed, last in enumerate([0.6, 0.7]):
        write_run(tmp_path / f"a_seed-{seed}", {"norm": "none", "rate": 1.0}, val__loss=[1.0, last])
    for name in ("a_seed-2", "b"):
        write_run(tmp_path / name, {"norm": "none", "rate": float(name == "b") + 1}, train__loss=[1.0])
    (axes,) = draw_parameter(read_variants(tmp_path), "val/loss", "", [], parameter="rate").axes
    np.testing.assert_allclose(points(axes)["no norm"], [[1.0, 0.65], [2.0, np.nan]], rtol=1e-6)
    assert not crosses(axes)


def test_a_result_beyond_the_axes_is_told(tmp_path, write_run, read_variants):
    for name, rate, last in (("a", 1.0, 2.0), ("b", 2.0, 1.0), ("c", 3.0, 1e9)):
        write_run(tmp_path / name, {"norm": "none", "rate": rate}, val__loss=[3.0, last])
    (axes,) = draw_parameter(read_variants(tmp_path), "val/loss", "", [], parameter="rate").axes
    assert axes.get_ylim()[1] < 100
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "^"] == [3.0]
    (told,) = [text for text in axes.texts if text.get_text() == "1e+09"]
    # Also beside the last value, where the legend begins.
    axes.figure.draw_without_rendering()
    box, inside = told.get_window_extent(), axes.get_window_extent()
    assert inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1


def test_zero_has_a_place_on_the_axis(tmp_path, write_run, read_variants):
    for name, rate in (("a", 0.0), ("b", 0.5)):
        write_run(tmp_path / name, {"options": {"rate": rate}, "kind": "x"}, val__loss=[3.0, 1.0])
    drawn = draw_parameter(read_variants(tmp_path), "val/loss", "", [], parameter="options.rate", group="kind")
    (axes,) = drawn.axes
    assert axes.get_xscale() == "linear" and axes.get_xlabel() == "rate (options.rate)" and legend(axes) == ["x"]


@pytest.mark.parametrize("largest_first", [False, True])
def test_a_panel_stands_for_each_value(sweep, largest_first):
    drawn = draw_panels(
        sweep, "val/loss", "rates", [], parameter="learning_rate", panels_per_row=2, largest_first=largest_first
    )
    titles = [axes.get_title() for axes in drawn.axes]
    expected = ["learning rate = 0.0001", "learning rate = 0.001", "learning rate = 1e+12"]
    assert titles == (expected[::-1] if largest_first else expected)
    first = drawn.axes[titles.index("learning rate = 0.0001")]
    lines = [line for line in first.get_lines() if line.get_marker() != "x"]
    for line, norm in zip(lines, ("none", "custom"), strict=True):
        runs = sweep[f"{norm}_learning_rate-0.0001"]
        assert line.get_xdata().tolist() == [4, 8, 12]
        np.testing.assert_allclose(line.get_ydata(), np.median([run.scalars["val/loss"][1] for run in runs], axis=0))
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts == ["no norm", "batch norm (ours)", "diverged (NaN or infinity)"]
    diverged = drawn.axes[titles.index("learning rate = 1e+12")]
    steps = [run.first_nonfinite[0] for run in sweep["none_learning_rate-1000000000000.0"]]
    assert (min(steps), lines[0].get_color()) in crosses(diverged) and not crosses(first)
    # Numbers stand at the outer panels only.
    drawn.canvas.draw()
    assert [bool(axes.yaxis.get_tick_params()["labelleft"]) for axes in drawn.axes] == [True, False, True]
    assert [any(label.get_visible() for label in axes.get_xticklabels()) for axes in drawn.axes] == [False, True, True]
    assert len({axes.get_ylim() for axes in drawn.axes}) == 1


def test_panels_of_accuracies_reach_from_0_to_1_and_count_epochs(tmp_path, write_run, read_variants):
    for name, std in (("a", 0.0631), ("b", 1.0)):
        write_run(tmp_path / name, {"norm": "none", "weight_std": std}, val__acc=[0.3, 0.5, 0.6])
    variants = read_variants(tmp_path)
    drawn = draw_panels(variants, "val/acc", "", [], parameter="weight_std", steps_per_epoch=10)
    assert [axes.get_title() for axes in drawn.axes] == ["std = 0.0631", "std = 1"]
    assert drawn.axes[0].get_lines()[0].get_xdata().tolist() == [0, 1, 2]
    low, high = drawn.axes[0].get_ylim()
    assert -0.05 < low < 0 and 1 < high < 1.05
    assert "epochs" in [text.get_text() for text in drawn.texts]
    with pytest.raises(ValueError, match="steps_per_epoch=0 is not possible"):
        draw_panels(variants, "val/acc", "", [], parameter="weight_std", steps_per_epoch=0)


@pytest.mark.parametrize("group", ["norm", "momentum"])
def test_a_legend_lies_between_the_title_and_the_panels(group, tmp_path, write_run, read_variants):
    for index, norm in enumerate(("none", "custom", "torch")):
        hparams = {"norm": norm, "momentum": 0.1 * index, "weight_std": 1.0}
        write_run(tmp_path / norm, hparams, 10, val__acc=[0.3, 0.5, 0.6])
    if group == "momentum":
        for index in range(3, 9):
            hparams = {"norm": "torch", "momentum": 0.1 * index, "weight_std": 1.0}
            write_run(tmp_path / f"torch_momentum-{index}", hparams, val__acc=[0.3, 0.5, 0.6])
    drawn = draw_panels(read_variants(tmp_path), "val/acc", "stds", [], parameter="weight_std", group=group)
    drawn.draw_without_rendering()
    box, title, panel = (part.get_window_extent() for part in (drawn.legends[0], drawn.texts[0], drawn.axes[0].title))
    assert len(drawn.legends[0].get_texts()) == (4 if group == "norm" else 10)
    assert box.x0 > 0 and box.x1 < drawn.bbox.x1 and title.x1 < drawn.bbox.x1
    assert panel.y1 <= box.y0 and box.y1 <= title.y0


@pytest.mark.parametrize(
    ("draw", "options", "message"),
    [
        (draw_parameter, {"parameter": "rate"}, "'rate' is no hyperparameter of the run in .*: choose one of norm, "),
        (draw_parameter, {"parameter": "depth"}, "have the same norm, depth: this figure needs runs that differ in"),
        (draw_panels, {"parameter": "depth"}, "have the same depth, norm"),
        (draw_panels, {"parameter": "learning_rate", "panels_per_row": 0}, "panels_per_row=0 is not possible"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, options, message, sweep):
    with pytest.raises(ValueError, match=message):
        draw(sweep, "val/loss", "", [], **options)


def test_a_parameter_that_is_no_number_is_named(depths):
    with pytest.raises(ValueError, match="parameter='activation' is not possible: 'sigmoid' is no number"):
        draw_parameter({"custom": depths["custom_2"]}, "val/loss", "", [], parameter="activation")


@pytest.mark.parametrize(
    ("draw", "options"),
    [(draw_parameter, {"parameter": "depth"}), (draw_panels, {"parameter": "depth"})],
)
def test_one_run_is_a_sweep_of_one(draw, options, depths, tmp_path):
    drawn = draw({"custom": depths["custom_2"]}, "val/loss", "one", [], **options)
    assert isinstance(drawn, Figure)
    drawn.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
