import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from bnlightning.compare.figures.style import (
    by_values,
    histogram_range,
    in_order,
    legend_of,
    log_range,
    set_value_limits,
    setting_in_words,
    style,
    value_range,
    without_math,
)
from bnlightning.compare.runs import HistogramAt


def test_many_variants_are_drawn_differently():
    variants = {f"custom_rate-{rate}": [] for rate in range(8)}
    colors = {style(name, variants)[0] for name in variants}
    own = {style(name, variants)[0] for name in ("none", "custom", "torch")}
    assert len(colors | own) == 11


def test_every_variant_has_a_style_of_its_own():
    variants = {name: [] for name in ["none", "custom", "torch", *map(str, range(12))]}
    styles = [style(name, variants) for name in variants]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize(
    ("names", "title", "labels"),
    [
        (["custom_rate-1e-3", "custom_rate-1e-4"], "batch norm (ours), rate", ["1e-3", "1e-4"]),
        (["custom_a-x_rate-1", "custom_a-x_rate-2"], "batch norm (ours), a x, rate", ["1", "2"]),
        (["custom_a-1_b-1", "custom_a-2_b-2"], "batch norm (ours)", ["a 1, b 1", "a 2, b 2"]),
        (["run_convention-keras", "run_convention-flax"], "convention", ["keras", "flax"]),
        (["custom_rate-1", "none_rate-1"], "", ["batch norm (ours), rate 1", "no norm, rate 1"]),
        (["custom_a-1", "custom_b-1"], "batch norm (ours)", ["a 1", "b 1"]),
        (["custom_a-1", "custom_a-1_b-1"], "", ["batch norm (ours), a 1", "batch norm (ours), a 1, b 1"]),
        (["x/none_a-1", "x/none_a-2"], "x/no norm, a", ["1", "2"]),
        (["none", "no norm"], "", ["none", "no norm"]),
        (["custom", "custom_b-1"], "", ["batch norm (ours)", "batch norm (ours), b 1"]),
        (["x/custom_a-1", "y/custom_a-2"], "", ["x/batch norm (ours), a 1", "y/batch norm (ours), a 2"]),
        (["custom_rate-1"], "", ["batch norm (ours), rate 1"]),
        (["none", "custom", "torch", "other"], "", ["no norm", "batch norm (ours)", "batch norm (torch)", "other"]),
    ],
)
def test_a_legend_names_what_tells_variants_apart(names, title, labels):
    assert legend_of({name: [] for name in names}) == (title, dict(zip(names, labels, strict=True)))


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("norm", "none", "no norm"),
        ("norm", "torch", "batch norm (torch)"),
        ("norm_placement", "none", "norm placement = none"),
        ("activation", "tanh", "tanh"),
        ("weight_std", 0.063123, "std = 0.0631"),
        ("depth", 7, "depth = 7"),
    ],
)
def test_settings_are_told_in_words(parameter, value, words):
    assert setting_in_words(parameter, value) == words


def test_values_are_in_order():
    assert in_order(["torch", "none", "custom", "none"]) == ["none", "custom", "torch"]
    assert in_order([10, 2, 0.5]) == [0.5, 2, 10] and in_order(["b", "a"]) == ["a", "b"]
    assert in_order([("tanh", 10), ("tanh", 2), ("relu", 10)]) == [("relu", 10), ("tanh", 2), ("tanh", 10)]


def test_variants_that_differ_in_something_else_are_told_in_words(tmp_path, write_run, read_variants):
    for depth in (2, 3):
        write_run(tmp_path / f"custom_depth-{depth}", {"norm": "custom", "depth": depth}, val__loss={0: 1.0})
    variants = read_variants(tmp_path)
    assert [*by_values(variants, ["depth"])] == [(2,), (3,)]
    with pytest.raises(ValueError, match=r"the variants 'batch norm \(ours\), depth 2' and .* have the same norm: "):
        by_values(variants, ["norm"])


@pytest.mark.parametrize(
    ("values", "metric", "limits"),
    [
        ([[1.0, 2.0, 1e6], [1.0, 3.0, 4.0]], "val/loss", (1.0, 4.0)),
        ([[1.0, 20.0], [1.0, 3.0]], "val/loss", (1.0, 20.0)),
        ([[-3.0, np.nan], [-1.0, np.inf]], "val/loss", (-3.0, -1.0)),
        ([[0.1, 0.9]], "val/acc", (0.1, 0.9)),
        ([[np.nan]], "val/loss", (0.0, 1.0)),
    ],
)
def test_limits_hold_all_but_what_would_flatten_the_rest(values, metric, limits):
    assert value_range([np.array(each) for each in values], metric) == limits


@pytest.mark.parametrize(
    ("low", "high", "metric", "scale"),
    [(1.0, 10.0, "val/loss", "log"), (1.0, 4.0, "val/loss", "linear"), (0.1, 0.9, "val/acc", "linear")],
)
def test_costs_of_several_magnitudes_have_a_logarithmic_scale(low, high, metric, scale):
    axes = Figure().add_subplot()
    set_value_limits(axes, low, high, metric)
    bottom, top = axes.get_ylim()
    assert axes.get_yscale() == scale and bottom < low < high < top


@pytest.mark.parametrize(
    ("edges", "counts", "limits"),
    [
        ([-0.5, 0.0, 0.9], [1, 1], (-1.0, 1.0)),
        ([0.0, 0.9], [1], (0.0, 1.0)),
        ([0.0, 10.0, 1000.0], [1000, 1], (0.0, 9.96)),
        ([3.0, 3.0], [1], (2.5, 3.5)),
    ],
)
def test_a_layers_values_have_room(edges, counts, limits):
    histogram = HistogramAt(0, np.array(edges), np.array(counts, dtype=np.float64))
    assert histogram_range([histogram]) == pytest.approx(limits, rel=1e-3)
    assert histogram_range([]) == (0.0, 1.0)


def test_logarithms_have_at_least_a_decade_and_no_infinity():
    assert log_range([np.array([2.0, 2.0, -np.inf, np.nan])]) == (2.0, 3.0)
    assert log_range([np.array([0.0] * 9 + [30.0, 30.0])]) == (0.0, 6.0)
    assert log_range([np.array([np.nan])]) == (-1.0, 1.0)


def test_a_dollar_in_a_name_is_no_formula_and_powers_of_ten_still_are():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 1e6], label="$\\frac$")
    axes.set_yscale("log")
    axes.set_title("net.$\\x$")
    axes.set_ylabel("$\\y$")
    axes.text(0, 1, "$\\z$")
    axes.legend(title="$\\t$")
    figure.text(0, 0, "$\\note$")
    assert without_math(figure) is figure
    # A name that is no formula would raise.
    figure.savefig(io.BytesIO(), format="png")
    assert axes.yaxis.get_major_ticks()[0].label1.get_parse_math()
