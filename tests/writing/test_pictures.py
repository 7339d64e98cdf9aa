import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bnlightning.monitors.counting.histogram import count_values
from bnlightning.monitors.counting.layer_statistics import layer_catalogue
from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.record import Entry, Record
from bnlightning.monitors.statistic import Look
from bnlightning.writing.history import History, coarsen
from bnlightning.writing.pictures import (
    NONFINITE,
    draw_distributions,
    draw_surfaces,
    step_edges,
    surface_image,
    value_panel,
)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(x):
    return coarsen(count_values(x).numpy()[None])[0]


LOOKS = layer_catalogue().looks()


def looks(*statistics):
    """How our statistics are shown; those that are not ours have no look of their own."""
    return {statistic: LOOKS.get(statistic) for statistic in statistics}


def history_of(layers, samples=5, every=10, statistics=("dead",), x=None):
    history = History(max_layers=16)
    bins = dict.fromkeys(layers, count_values(normal(200) if x is None else x).numpy())
    for sample in range(samples):
        values = {statistic: dict.fromkeys(layers, sample / samples) for statistic in statistics}
        history.add(every * sample, bins, values)
    return history


def texts(figure):
    labels = [label for axes in figure.axes for label in (*axes.texts, *axes.get_yticklabels())]
    return [label.get_text() for label in labels]


def arrays(figure):
    """Of all images but the scales."""
    images = [np.ma.filled(image.get_array(), np.nan) for axes in figure.axes for image in axes.images]
    return [image for image in images if image.shape[0] > 1 or image.shape[1] != 64]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "x",
    [
        normal(20000),
        normal(20000, scale=1e-3),
        normal(20000) + 30,
        torch.relu(normal(20000)),
        torch.tanh(normal(20000, scale=2)),
        torch.sigmoid(normal(20000)),
        torch.nn.functional.gelu(normal(20000)),
        torch.nn.functional.relu6(normal(20000, scale=8)),
        torch.cat([normal(20000), torch.tensor([1e6])]),
    ],
    ids=["normal", "small", "far from zero", "relu", "tanh", "sigmoid", "gelu", "relu6", "outlier"],
)
def test_panel_against_numpy_within_a_bin(x):
    panel = value_panel([distribution(x)])

    values = x.numpy().astype(np.float64)
    assert panel.shares.sum() == pytest.approx(1, abs=1e-3)
    edges = np.linspace(panel.low, panel.high, len(panel.shares) + 1)
    widths = np.maximum(np.abs(edges) / 8, np.quantile(np.abs(values), 0.99) / 16)[1:-1]
    # A row is higher than the error of the position of its edges, where there are enough rows to tell.
    below = np.cumsum(panel.shares[:, 0])[:-1]
    for edge, width, share in zip(edges[1:-1], widths, below, strict=True):
        least, most = (values < edge - width).mean(), (values <= edge + width).mean()
        assert least - 1e-3 <= share <= most + 1e-3


def test_panel_shows_nearly_all_values():
    for x in (normal(5000), normal(5000) + 30, torch.relu(normal(5000)), torch.cat([normal(5000), normal(5) * 1e8])):
        panel = value_panel([distribution(x)])
        inside = ((x >= panel.low) & (x <= panel.high)).float().mean()
        assert inside > 0.985
        spread = float(x.quantile(0.995) - x.quantile(0.005))
        assert panel.high - panel.low < 3 * spread


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (torch.tanh(normal(500, scale=3)), -1, 1),
        (torch.tanh(normal(500, scale=0.5)), -1, 1),
        (torch.sigmoid(normal(500)), 0, 1),
        (torch.zeros(10), 0, 1),
        (torch.full((3,), torch.nan), -1, 1),
    ],
)
def test_fixed_ranges(x, low, high):
    panel = value_panel([distribution(x)])
    assert (panel.low, panel.high) == (low, high)


def test_scale_begins_at_zero_and_zeros_are_its_first_row():
    panel = value_panel([distribution(torch.relu(normal(5000) - 0.5))])

    assert panel.low == 0
    assert panel.shares[0, 0] > 0.65
    assert panel.shares[1:, 0].max() < 0.1


def test_zeros_are_the_middle_row_of_a_symmetric_scale():
    x = torch.where(normal(5000, seed=1) > 0, normal(5000), 0.0)
    panel = value_panel([distribution(x)])

    assert panel.low == -panel.high
    assert panel.shares[:, 0].argmax() == len(panel.shares) // 2
    assert panel.shares.max() > 0.4


def test_outliers_do_not_flatten_the_panel_but_are_at_its_edge():
    usual = [distribution(normal(500, seed=seed)) for seed in range(20)]
    exploded = distribution(normal(500).abs() * 1e12)

    panel = value_panel([*usual, exploded])

    assert panel.high < 6
    np.testing.assert_allclose(panel.shares[-1, -1], 1, atol=0.02)


def test_growing_values_stay_inside():
    panel = value_panel([distribution(normal(500) * scale) for scale in np.linspace(1, 5, 20)])

    assert panel.high > 10


def test_image_is_logarithmic_in_the_counts():
    panel = value_panel([distribution(torch.tanh(normal(5000)))])

    expected = np.log(1 + 1000 * panel.shares) / np.log(1001)
    np.testing.assert_allclose(panel.image(), expected)


def test_rounded_shares_never_look_like_nan():
    # Rounded to float16, their sum may be above 1.
    for seed in range(50):
        x = torch.cat([torch.zeros(3000), normal(1 + 37 * seed, seed=seed) * 1e-9, normal(1)])
        assert value_panel([distribution(x), distribution(normal(1) * 1e9)]).image().max() <= 1


@pytest.mark.parametrize("share", [1e-3, 0.6, 1.0])
def test_nonfinite_samples_are_marked(share):
    broken = normal(1000)
    broken[: int(1000 * share)] = torch.nan
    panel = value_panel([distribution(normal(1000)), distribution(broken), None])

    image = panel.image()

    marked = (image == NONFINITE).mean(axis=0)
    assert marked[0] == 0
    assert marked[1] == pytest.approx(max(share, 0.3), abs=0.03)
    assert (np.diff((image[:, 1] == NONFINITE).astype(int)) >= 0).all()
    assert np.isnan(image[:, 2]).all()


def test_distributions_in_the_figure():
    values = {"net.norm": normal(500), "net.tanh": torch.tanh(normal(500)), "net.relu": torch.relu(normal(500))}
    history = History()
    for step in (0, 10, 20):
        bins = {
            layer: count_values(x * (1 + step)).numpy() for layer, x in values.items() if step or "tanh" not in layer
        }
        history.add(step, bins, {"zero": {"net.relu": 0.49}, "nonfinite": {"net.norm": 0.0}})

    figure = draw_distributions(history, LOOKS)

    assert {"net.norm", "net.tanh", "net.relu", "49 % zeros"} <= set(texts(figure))
    for layer, image in zip(history.layers, arrays(figure), strict=True):
        np.testing.assert_array_equal(image, value_panel(history.distributions(layer)).image())
    png(figure)


def test_what_stands_out_is_the_worst():
    history = History()
    layers = ["fine", "tanh", "dead", "broken"]
    statistics = {
        "nonfinite": {"fine": 0.0, "tanh": 0.0, "dead": 0.0, "broken": 1e-4},
        "dead": {"fine": 0.0, "tanh": 0.0, "dead": 0.25, "broken": 1.0},
        "saturated": {"tanh": 0.875, "fine": None},
        "zero": {"dead": 0.5, "fine": 0.0},
    }
    for step, scale in ((0, 0.0), (1, 1.0)):
        values = {
            name: {layer: value and value * scale for layer, value in row.items()} for name, row in statistics.items()
        }
        history.add(step, dict.fromkeys(layers, count_values(normal(50)).numpy()), values)

    found = texts(draw_distributions(history, LOOKS))

    assert [text for text in found if " % " in text and "NaN" in text] == ["< 1 % NaN/inf"]
    assert "25 % dead units" in found
    assert "88 % saturated" in found
    assert not any("zeros" in text for text in found)


def test_at_most_sixteen_layers_are_drawn():
    history = history_of([f"layer{number}" for number in range(53)])

    figure = draw_distributions(history, LOOKS)

    assert len(arrays(figure)) == 16
    assert any("16 of 53 layers" in text for text in texts(figure))
    assert {"layer0", "layer52"} <= set(texts(figure))


def test_surface_of_a_fraction():
    history = History()
    for step, values in enumerate([{"a": 0.0, "b": 0.5}, {"a": 0.25}, {"b": 1.0, "a": None}]):
        history.add(step, dict.fromkeys("ab", count_values(normal(9)).numpy()), {"dead": values})

    nan = np.nan
    np.testing.assert_allclose(surface_image(history, "dead", looks("dead")), [[0, 0.4, nan], [0.6, nan, 1]])
    (image,) = arrays(draw_surfaces(history, looks("dead")))
    np.testing.assert_array_equal(image, surface_image(history, "dead", looks("dead")))


def test_surface_of_the_standard_deviation_is_logarithmic_around_one():
    history = History()
    values = [1.0, 10.0, 0.04, 0.02, 40.0, 1e-4, 0.0, 1e9, float("inf")]
    history.add(0, {}, {"std": {str(number): value for number, value in enumerate(values)}})

    image = surface_image(history, "std", looks("std"))[:, 0]

    # White between 0.03 and 30; the palest colours are told apart from white.
    np.testing.assert_array_equal(image[:3], 0.5)
    assert 0.35 < image[3] < 0.4 and 0.6 < image[4] < 0.65
    np.testing.assert_allclose(image[5:], [0, 0, 1, NONFINITE], atol=1e-6)


def test_what_is_healthy_is_white_and_what_is_just_not_is_a_colour():
    low = Look("low", "low", 1e-8, 1.0, {1.0: "1"}, log=True, healthy=(1e-4, float("inf")))
    alarm = Look("alarm", healthy=(0.0, 0.5))
    history = History()
    history.add(0, {}, {"low": {"a": 1e-4, "b": 5.0, "c": 0.9e-4, "d": 1e-8, "e": 0.0}})
    history.add(1, {}, {"alarm": {"a": 0.5, "b": 0.0, "c": 0.51, "d": 1.0, "e": None}})

    np.testing.assert_allclose(surface_image(history, "low", {"low": low})[:, 0], [0, 0, 0.2, 1, 1], atol=0.01)
    np.testing.assert_allclose(
        surface_image(history, "alarm", {"alarm": alarm})[:, 1], [0, 0, 0.22, 1, np.nan], atol=0.01
    )
    found = texts(draw_surfaces(history, {"low": low, "alarm": alarm}))
    assert {"white: from 0.0001 up", "white: up to 0.5"} <= set(found)


GRADIENTS = parameter_catalogue().looks()


def test_gradients_are_shown_beside_the_last_layers():
    history = History()
    norms = {"a": 1e-12, "b": 1e-6, "c": 1e-2, "d": 1.0}
    history.add(0, {}, {"grad_norm": norms})
    # The same at another scale, turned around, a dead layer, and nothing but zeros.
    history.add(1, {}, {"grad_norm": {name: 1e-20 * value for name, value in norms.items()}})
    history.add(2, {}, {"grad_norm": {"a": 1e12, "b": 1e6, "c": 1e2, "d": 1.0}})
    history.add(3, {}, {"grad_norm": {"a": 0.0, "b": 2.0, "c": 3.0, "d": 0.0}})
    history.add(4, {}, {"grad_norm": dict.fromkeys(norms, 0.0)})

    image = surface_image(history, "grad_norm", GRADIENTS)

    vanishing, same, exploding, dead, nothing = image.T
    assert vanishing[0] == 0 and 0 < vanishing[1] < 0.4
    np.testing.assert_array_equal(vanishing[2:], 0.5)
    np.testing.assert_allclose(same, vanishing)
    np.testing.assert_allclose(exploding, 1 - vanishing, atol=1e-6)
    np.testing.assert_array_equal(dead, [0, 0.5, 0.5, 0])
    np.testing.assert_array_equal(nothing, 0)


def test_a_gradient_with_nan_is_red_and_not_hatched():
    history = History()
    history.add(0, {}, {"grad_norm": {"a": 1.0, "b": 1.0}, "grad_nonfinite": {"a": 0.0, "b": 0.0}})
    history.add(1, {}, {"grad_norm": {"a": None, "b": None}, "grad_nonfinite": {"a": 0.01, "b": None}})

    np.testing.assert_array_equal(surface_image(history, "grad_norm", GRADIENTS), [[0.5, NONFINITE], [0.5, np.nan]])


def pixels(figure, axes):
    """The colours in the picture where axes are, of shape (height, width, 3)."""
    image = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"), dtype=int)
    left, bottom, right, top = (round(edge) for edge in axes.get_window_extent().extents)
    return image[len(image) - top : len(image) - bottom, left:right]


def test_in_the_png_ill_is_coloured_healthy_white_and_not_measured_hatched():
    history = History()
    history.add(
        0, {}, {"dead": {"healthy": 0.0, "ill": 0.02, "broken": 0.0, "late": None}, "nonfinite": {"broken": 1.0}}
    )
    history.add(1, {}, {"dead": {"healthy": 0.0, "ill": 1.0, "broken": 0.0, "late": 0.0}, "nonfinite": {"broken": 1.0}})
    figure = draw_surfaces(history, looks("dead", "nonfinite"))
    found = pixels(figure, figure.axes[1])
    height, half = len(found) // 4, found.shape[1] // 2
    cells = {}
    for row, name in enumerate(["healthy", "ill", "broken", "late"]):
        for column in (0, 1):
            rows = slice(row * height + 4, (row + 1) * height - 4)
            cells[name, column] = found[rows, column * half + 4 : (column + 1) * half - 4].reshape(-1, 3)
    for white in (("healthy", 0), ("healthy", 1), ("late", 1)):
        assert (cells[white] == 255).all()
    # The palest orange is no white: blue is well below red.
    assert (cells["ill", 0][:, 0] - cells["ill", 0][:, 2] > 30).all()
    assert (cells["ill", 1].mean(axis=0) < [130, 60, 30]).all()
    assert (abs(cells["broken", 0] - [227, 0, 27]) < 3).all()
    # A hatch has lines on a ground, and no colour.
    hatched = cells["late", 0]
    assert (abs(hatched[:, 0] - hatched[:, 2]) < 3).all() and hatched[:, 0].std() > 10 and hatched[:, 0].max() < 250


def test_labels_carry_the_class():
    history = History()
    record = {
        "net.1": Entry({"dead": 0.5}, bins=count_values(normal(9)).numpy(), is_activation=True, module="ReLU"),
        "x" * 50: Entry({"dead": 0.5}, bins=count_values(normal(9)).numpy(), is_activation=True, module="Y" * 50),
    }
    for step in (0, 1):
        history.add_record(Record(step, layers=record), looks("dead"))
    for figure in (draw_distributions(history, LOOKS), draw_surfaces(history, looks("dead"))):
        assert "net.1 (ReLU)" in texts(figure)
        (long,) = [text for text in texts(figure) if "YYY" in text]
        # The distributions have more room.
        assert long.startswith(("…x", "x" * 50)) and long.endswith(f"x ({'Y' * 19}…)")


@pytest.mark.parametrize("kind", ["layer", "param", "norm"])
def test_every_kind_says_what_its_rows_and_white_are(kind):
    history = History()
    history.add(0, {}, {"dead": {"a": 0.0}})
    figure = draw_surfaces(history, looks("dead"), kind)
    (text,) = [text for text in texts(figure) if "White is measured and healthy" in text]
    renderer = FigureCanvasAgg(figure).get_renderer()
    (written,) = [each for each in figure.axes[0].texts if each.get_text() == text]
    assert written.get_window_extent(renderer).x1 < 960
    assert {"healthy", "NaN or infinite", "not measured"} <= set(texts(figure))


def test_surface_of_an_unknown_statistic_has_the_scale_of_the_run():
    history = History()
    for step in range(5):
        history.add(step, {}, {"grad_norm": {"a": 10.0**step, "b": 0.0, "c": 1e30 if step == 2 else None}})

    image = surface_image(history, "grad_norm", looks("grad_norm"))

    assert (np.diff(image[0]) > 0).all()
    np.testing.assert_array_equal(image[1], 0)
    assert image[2, 2] == 1
    png(draw_surfaces(history, looks("grad_norm")))


def test_surface_marks_whatever_is_nonfinite():
    history = History()
    history.add(0, {}, {"nonfinite": {"a": 0.0, "b": 1e-6, "c": 1.0}, "zero": {"a": 0.5, "b": 0.5, "c": 0.5}})
    # Nothing is known of the zeros of c, and b was never asked for them.
    history.add(1, {}, {"nonfinite": {"a": 1.0, "b": 1.0, "c": 1.0}, "zero": {"a": 0.5, "c": None}})

    np.testing.assert_array_equal(
        surface_image(history, "nonfinite", looks("nonfinite")) == NONFINITE, [[0, 1], [1, 1], [1, 1]]
    )
    np.testing.assert_array_equal(surface_image(history, "zero", looks("zero")) == NONFINITE, [[0, 1], [0, 1], [1, 1]])


def test_layers_that_never_have_a_statistic_are_not_marked():
    history = History()
    history.add(0, {}, {"nonfinite": {"norm": 1.0, "tanh": 1.0}, "saturated": {"norm": None, "tanh": 0.5}})

    image = surface_image(history, "saturated", looks("saturated"))

    assert np.isnan(image[0, 0])
    assert image[1, 0] == NONFINITE
    (image,) = arrays(draw_surfaces(history, looks("saturated")))
    assert image.shape == (1, 1)


def test_surfaces_side_by_side_share_their_rows():
    history = History()
    for step in range(3):
        history.add(step, {}, {"dead": {"a": 0.5, "b": 0.5}, "saturated": {"b": 0.5, "c": 0.5}, "other": {"d": 1}})

    figure = draw_surfaces(history, looks("dead", "saturated", "zero"))

    first, second = arrays(figure)
    assert first.shape == second.shape == (3, 3)
    assert np.isnan(first[2]).all()
    assert np.isnan(second[0]).all()
    assert any("3 of 4 layers" in text for text in texts(figure))
    assert {"a", "b", "c", "dead units", "saturated"} <= set(texts(figure))
    assert "zeros" not in texts(figure)


@pytest.mark.parametrize("number", [1, 60, 61, 1000])
def test_labels_of_many_layers(number):
    layers = [f"layer{index}" for index in range(number)]

    figure = draw_surfaces(history_of(layers), looks("dead"))

    labels = [text for text in texts(figure) if text.startswith("layer")]
    assert labels[0] == "layer0"
    assert min(number, 30) <= len(labels) <= 60
    (image,) = arrays(figure)
    assert image.shape[0] == number
    # No row is less than a pixel.
    height = figure.axes[1].get_window_extent().height
    assert height >= number


@pytest.mark.parametrize(("number", "rows", "group"), [(4096, 4096, 1), (4097, 2049, 2), (70_000, 3889, 18)])
def test_of_thousands_of_layers_the_worst_of_neighbours_is_shown(number, rows, group):
    layers = [f"layer{index}" for index in range(number)]
    ill = {"dead": number - 2, "nonfinite": number // 2, "std": 7}
    values = {
        "dead": {layer: 0.25 for layer in layers} | {layers[ill["dead"]]: 1.0},
        "nonfinite": {layer: 0.0 for layer in layers} | {layers[ill["nonfinite"]]: 0.01},
        # Healthy is in the middle of this scale: both ends are ill.
        "std": {layer: 1.0 for layer in layers} | {layers[ill["std"]]: 1e-4},
    }
    history = History()
    for step in range(2):
        history.add(step, {}, values)
    figure = draw_surfaces(history, looks(*values))

    dead, nonfinite, std = arrays(figure)
    for image, statistic, healthy, worst in ((dead, "dead", 0.4, 1.0), (std, "std", 0.5, 0.0)):
        expected = np.full((rows, 2), healthy)
        expected[ill[statistic] // group] = worst
        np.testing.assert_allclose(image, expected, atol=1e-6)
    assert np.flatnonzero((nonfinite == NONFINITE).all(axis=1)).tolist() == [ill["nonfinite"] // group]
    assert any(f"the worst of every {group} a row" in text for text in texts(figure)) == (group > 1)
    assert figure.get_figheight() * figure.dpi < 5000


def test_columns_stand_at_their_steps():
    history = History()
    for step in (0, 10, 20, 25):
        history.add(step, {"a": count_values(normal(9)).numpy()}, {})

    np.testing.assert_array_equal(step_edges(history), [0, 10, 20, 25, 35])


def test_single_sample():
    history = history_of(["a"], samples=1)

    np.testing.assert_array_equal(step_edges(history), [0, 1])
    for figure in (draw_distributions(history, LOOKS), draw_surfaces(history, looks("dead"))):
        (image,) = arrays(figure)
        assert image.shape[1] == 1
        assert png(figure)


@pytest.mark.parametrize(
    "draw", [lambda history: draw_distributions(history, LOOKS), lambda history: draw_surfaces(history, looks("dead"))]
)
def test_nothing_sampled(draw):
    figure = draw(History())

    assert "Nothing has been sampled yet." in texts(figure)
    assert arrays(figure) == []
    assert png(figure)


def test_samples_without_anything():
    history = History()
    history.add(0, {}, {})
    history.add(1, {}, {"dead": {"a": None}})

    assert "Nothing has been sampled yet." in texts(draw_surfaces(history, looks("dead")))
    assert "Nothing has been sampled yet." in texts(draw_distributions(history, LOOKS))


def test_odd_names_and_statistics():
    layers = ["a$b_1$", "x" * 300, "net.$\\frac$", "tail_" * 40 + "end", "{a}", "{0", "50 %s", "層.1", "a\nb", "\0"]
    figure = draw_distributions(history_of(layers), LOOKS)
    assert png(figure)
    assert any(text.endswith("tail_end") and text.startswith("…") for text in texts(figure))
    figure = draw_surfaces(history_of(layers, statistics=("weird $\\x$",)), looks("weird $\\x$"))
    # Warnings of glyphs that the font does not have would be errors.
    assert png(figure)
    assert {"a$b_1$", "{a}", "50 %s", "?.1", "a?b", "?"} <= set(texts(figure))


def test_hundreds_of_layers_are_drawn_in_time():
    names = [f"features.block{number}.act" for number in range(300)]
    statistics = ["nonfinite", "dead", "saturated", "zero", "std"]
    history = history_of(names, samples=128, statistics=statistics)
    draw_distributions(History(), LOOKS)
    for draw in (lambda: draw_distributions(history, LOOKS), lambda: draw_surfaces(history, looks(*statistics))):
        started = time.process_time()
        png(draw())
        # 0.2 s on an idle machine.
        assert time.process_time() - started < 2


def test_importing_does_not_wait_for_matplotlib():
    # Lightning's own imports may bring it: only what this module does is looked at.
    code = (
        "import sys, bnlightning.callbacks; "
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('matplotlib') or 'pictures' in name]; "
        "import bnlightning.writing.pictures as pictures; "
        "assert not any(name.startswith('matplotlib') for name in sys.modules); "
        "from bnlightning.writing.history import History; pictures.draw_distributions(History(), {}); "
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
