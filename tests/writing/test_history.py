import io
import tracemalloc

import numpy as np
import pytest
import torch

from bnlightning.monitors.counting.histogram import NUM_BINS, count_values
from bnlightning.writing.history import History, coarsen, evenly, nonzero_edges, nonzero_shares


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def counts(x):
    return count_values(x).numpy()


VALUES = {
    "normal": normal(5000),
    "small": normal(5000, scale=1e-4),
    "relu": torch.relu(normal(5000)),
    "tanh": torch.tanh(normal(5000, scale=4)),
    "negative": -normal(5000).abs() - 1,
    "constant": torch.full((100,), 0.3),
    "zeros": torch.zeros(100),
    "one outlier": torch.cat([normal(5000), torch.tensor([1e6])]),
    "wide": normal(5000) * 10.0 ** normal(5000, seed=1, scale=8),
    "denormal": normal(5000, scale=1e-39),
    "largest": torch.tensor([3.4e38, -3.4e38, 3.3e38, 1.0]),
    "some NaN": torch.cat([normal(3000), torch.full((7,), torch.nan), torch.tensor([torch.inf, -torch.inf])]),
    "all NaN": torch.full((9,), torch.nan),
}


@pytest.mark.parametrize("name", VALUES)
def test_coarse_bins_against_numpy(name):
    x = VALUES[name].numpy()

    (distribution,) = coarsen(counts(VALUES[name])[None])

    finite = x[np.isfinite(x)].astype(np.float64)
    # The smallest denormals share their bin with zero.
    zero = np.abs(finite) < 2.0**-129
    edges, shares = nonzero_edges([distribution])[0], nonzero_shares([distribution])[0]
    # numpy's bins hold their lower edges, ours the ends nearer to zero.
    middle = len(shares) // 2
    values = finite[~zero]
    positive = np.bincount(np.searchsorted(edges[middle:], values[values > 0], side="right") - 1, minlength=middle)
    magnitudes = -edges[middle::-1]
    negative = np.bincount(np.searchsorted(magnitudes, -values[values < 0], side="right") - 1, minlength=middle)
    assert (np.diff(edges) >= 0).all()
    np.testing.assert_allclose(shares, np.concatenate([negative[::-1], positive]) / len(x), rtol=1e-3, atol=1e-7)
    assert distribution.zeros == pytest.approx(zero.sum() / len(x), rel=1e-3)
    assert distribution.nonfinite == pytest.approx((len(x) - len(finite)) / len(x), rel=1e-3)


@pytest.mark.parametrize("name", ["normal", "small", "relu", "tanh", "one outlier", "some NaN"])
def test_bins_are_narrow_where_nearly_all_values_are(name):
    x = VALUES[name][VALUES[name].isfinite()].numpy()
    limit = np.quantile(np.abs(x), 0.99)

    edges = nonzero_edges(coarsen(counts(VALUES[name])[None]))[0]

    widths = np.diff(edges)[(edges[:-1] > -limit) & (edges[1:] < limit)]
    assert len(widths) > 16
    assert widths.max() <= limit / 8


def test_a_single_nan_among_a_billion_values_is_kept():
    bins = counts(torch.tensor([1.0, torch.nan]))
    bins[bins.argmax()] = 10**9

    (distribution,) = coarsen(bins[None])

    assert 0 < distribution.nonfinite < 1e-6


def test_several_layers_at_once_are_as_each_alone():
    bins = np.stack([counts(x) for x in VALUES.values()])

    for together, row in zip(coarsen(bins), bins, strict=True):
        (alone,) = coarsen(row[None])
        assert together.anchor == alone.anchor
        np.testing.assert_array_equal(together.shares, alone.shares)


def add(history, step, values, **statistics):
    """A sample in which the layers have constant values."""
    bins = {layer: counts(torch.full((4,), float(value))) for layer, value in values.items()}
    history.add(step, bins, statistics)


def test_all_samples_are_kept_while_there_is_room():
    history = History(max_steps=8)
    for step in (0, 5, 10, 12):
        add(history, step, {"a": step}, zero={"a": step / 16})

    assert history.steps.tolist() == [0, 5, 10, 12]
    assert history.layers == history.chosen_layers == ["a"]
    assert history.statistics == ["zero"]
    np.testing.assert_array_equal(history.values("zero"), [[0, 5 / 16, 10 / 16, 12 / 16]])


@pytest.mark.parametrize("max_steps", [2, 3, 8, 9, 128])
def test_thinned_samples_are_even_and_the_newest_is_there(max_steps):
    history = History(max_steps=max_steps)
    for sample in range(1000):
        add(history, 7 * sample, {"a": 1}, std={"a": sample})

        steps = history.steps
        assert len(steps) <= max_steps
        assert steps[-1] == 7 * sample
        gaps = np.diff(steps)
        assert steps[0] == 0
        assert len(set(gaps[:-1])) <= 1
        if len(gaps) > 1:
            assert gaps[-1] <= gaps[0]
            assert np.log2(gaps[0] / 7) % 1 == 0
        # At least half of the room is used.
        assert len(steps) >= min(sample + 1, max_steps // 2)
        np.testing.assert_array_equal(history.values("std")[0], steps / 7)


def test_memory_is_bounded():
    layers = [f"layer{number}" for number in range(200)]
    sample = counts(normal(100))
    bins, statistics = dict.fromkeys(layers, sample), {name: dict.fromkeys(layers, 0.5) for name in "abcdefgh"}
    history = History()
    tracemalloc.start()
    try:
        for step in range(300):
            history.add(step, bins, statistics)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    # Up to four samples of 16 layers are kept as they came.
    assert used < 1.1e6 + 4 * 16 * sample.nbytes + 600 * len(layers) * len(statistics)


def test_layer_that_appears_late_stands_behind_the_one_it_followed():
    history = History()
    add(history, 0, {"a": 1, "c": 1}, dead={"a": 0.5, "c": 1.0})
    add(history, 1, {"a": 1, "b": 1, "c": 1, "d": 1}, dead={"b": 0.25, "c": None})
    add(history, 2, {"first": 1, "a": 1, "d": 1}, dead={"first": 0.0, "d": 0.125})

    assert history.layers == ["first", "a", "b", "c", "d"]
    nan = np.nan
    expected = [[nan, nan, 0], [0.5, nan, nan], [nan, 0.25, nan], [1, nan, nan], [nan, nan, 0.125]]
    np.testing.assert_array_equal(history.values("dead"), expected)
    assert [each is not None for each in history.distributions("b")] == [False, True, False]
    assert [each is not None for each in history.distributions("a")] == [True, True, True]


class CountedName(str):
    """A name that counts how often it is compared with another one."""

    comparisons = 0

    def __eq__(self, other):
        CountedName.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_late_layer_takes_one_pass_over_the_others():
    comparisons = []
    for number in (100, 200):
        history = History()
        names = [f"layer{index}" for index in range(number)]
        history.add(0, {}, {"dead": {CountedName(name): 0.0 for name in names}})
        CountedName.comparisons = 0
        # Names of their own, as they are made anew for every sample: the same object would need no comparison.
        late = [*names[: number // 2], "late", *names[number // 2 :]]
        history.add(1, {}, {"dead": {CountedName(name): 0.0 for name in late}})
        comparisons.append(CountedName.comparisons)
        assert history.layers == late
    # Not four times as many, as it would be to look for each one's place among all.
    assert comparisons[1] < 3 * comparisons[0]


def test_layer_without_a_value_has_no_distribution():
    history = History()
    history.add(0, {"empty": np.zeros(NUM_BINS, dtype=np.int64), "a": counts(torch.ones(3))}, {})

    assert history.distributions("empty") == [None]
    assert history.distributions("a") != [None]


def test_distributions_are_of_evenly_chosen_layers():
    layers = [f"layer{number}" for number in range(53)]
    history = History(max_layers=5)
    for step in range(3):
        add(history, step, dict.fromkeys(layers, 1), dead=dict.fromkeys(layers, 0.5))

    assert history.chosen_layers == ["layer0", "layer13", "layer26", "layer39", "layer52"]
    assert all(None not in history.distributions(layer) for layer in history.chosen_layers)
    assert history.distributions("layer1") == [None] * 3
    assert history.values("dead").shape == (53, 3)


def test_late_layers_are_chosen_among_the_kept_ones():
    history = History(max_layers=4)
    add(history, 0, dict.fromkeys("abcdefgh", 1))
    kept = history.chosen_layers
    late = ["x", "y", "z"]
    for step in (1, 2):
        add(history, step, dict.fromkeys([*"abcdefgh", *late], 1))

    assert len(history.chosen_layers) == 4
    assert set(history.chosen_layers) <= {*kept, *late}
    assert set(history.chosen_layers) & set(late)
    for layer in history.chosen_layers:
        assert (history.distributions(layer)[0] is None) == (layer in late)
    for layer in set(kept) - set(history.chosen_layers):
        assert history.distributions(layer) == [None] * 3


def test_a_run_that_goes_back_forgets_what_was_after():
    history = History(max_steps=8)
    for step in range(0, 50, 10):
        add(history, step, {"a": 1}, std={"a": step})
    add(history, 20, {"a": 1}, std={"a": -1})
    assert history.steps.tolist() == [0, 10, 20]
    np.testing.assert_array_equal(history.values("std"), [[0, 10, -1]])

    add(history, 0, {"b": 1})
    assert history.steps.tolist() == [0]
    assert history.layers == ["b"]


def filled(max_steps=16, samples=70):
    history = History(max_steps=max_steps, max_layers=6)
    for sample in range(samples):
        layers = [f"net.{number}" for number in range(9) if (number + sample) % 4 and (number != 5 or sample > 9)]
        bins = {layer: counts(normal(50, seed=sample) * sample) for layer in layers}
        statistics = {
            "dead": {layer: (sample + len(layer)) / 100 for layer in layers},
            "saturated": {layer: None if layer.endswith("3") else 0.3 for layer in layers},
        }
        history.add(10 * sample, bins, statistics)
    return history


def assert_equal(one, other):
    assert one.layers == other.layers
    assert one.chosen_layers == other.chosen_layers
    np.testing.assert_array_equal(one.steps, other.steps)
    assert one.statistics == other.statistics
    for statistic in one.statistics:
        np.testing.assert_array_equal(one.values(statistic), other.values(statistic))
    for layer in one.layers:
        for mine, others in zip(one.distributions(layer), other.distributions(layer), strict=True):
            assert (mine is None) == (others is None)
            if mine is not None:
                assert mine.anchor == others.anchor
                assert mine.shares.dtype == others.shares.dtype
                np.testing.assert_array_equal(mine.shares, others.shares)


@pytest.mark.parametrize("samples", [0, 1, 10, 70])
def test_state_goes_through_a_checkpoint_and_on(samples):
    history, loaded = filled(samples=samples), History(max_steps=16, max_layers=6)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)

    loaded.load_state_dict(torch.load(file, weights_only=True))

    assert_equal(loaded, history)
    for step in range(1000, 1200, 10):
        for each in (history, loaded):
            add(each, step, {"net.0": 1, "new": step}, dead={"new": 0.5})
    assert_equal(loaded, history)


def test_state_of_a_longer_history_is_thinned():
    history, loaded = filled(max_steps=64), History(max_steps=8, max_layers=3)

    loaded.load_state_dict(history.state_dict())

    assert len(loaded.steps) <= 8
    assert loaded.steps[-1] == history.steps[-1]
    assert len(loaded.chosen_layers) == 3


def test_state_is_small():
    layers = [f"layer{number}.relu" for number in range(53)]
    history = History()
    for step in range(128):
        history.add(step, dict.fromkeys(layers, counts(torch.ones(5))), {"dead": dict.fromkeys(layers, 0.5)})
    file = io.BytesIO()
    torch.save(history.state_dict(), file)

    assert len(file.getvalue()) < 0.42e6 + 53 * 128 * 4


@pytest.mark.parametrize(("argument", "value"), [("max_steps", 1), ("max_layers", 0), ("max_steps", 2.5)])
def test_impossible_sizes(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        History(**{argument: value})


def test_evenly():
    assert evenly("abcdefg", 3) == ["a", "d", "g"]
    assert evenly("abc", 3) == evenly("abc", 9) == ["a", "b", "c"]
    assert evenly("abc", 1) == ["a"]
    assert evenly("", 3) == []


def test_numbers_beyond_float32_are_kept_as_the_largest_it_holds():
    history = History()
    history.add(0, {}, {"mean": {"a": 1e60, "b": -1e60, "c": 1.0}})
    largest = np.finfo(np.float32).max
    assert history.values("mean").flatten().tolist() == [largest, -largest, 1.0]
