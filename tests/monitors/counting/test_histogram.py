import numpy as np
import pytest
import torch

from bnlightning.monitors.counting.histogram import (
    NUM_BINS,
    Histogram,
    TypicalRanges,
    clip,
    count_values,
    finite_histogram,
    narrowed,
    num_zero,
)


def histogram_of(values):
    x = torch.as_tensor(values, dtype=torch.float32)
    return finite_histogram(
        count_values(x).numpy(), float(x.min()), float(x.max()), float(x.sum()), float(x.square().sum())
    )


def normal(number=10000, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=number)


def test_clipping_counts_what_is_outside_in_the_outermost_bin():
    histogram = Histogram(np.array([-4.0, -2, -1, 0, 1, 8]), np.array([1, 2, 3, 4, 5]), 1.0, 2.0)
    clipped = clip(histogram, -1.5, 0.5)
    assert clipped.edges.tolist() == [-1.5, -1, 0, 0.5] and clipped.counts.tolist() == [3, 3, 9]
    assert (clipped.sum, clipped.sum_squares) == (1.0, 2.0)
    assert clip(histogram, -10, 10) is histogram


@pytest.mark.parametrize(
    "values", [normal(), np.maximum(normal(), 0), np.tanh(3 * normal()), np.ones(50), np.zeros(20), normal(number=5)]
)
def test_what_is_typical_stays_as_it_is(values):
    ranges, histogram = TypicalRanges(), histogram_of(values)
    assert ranges.fit("tag", histogram) is histogram


def test_one_outlier_does_not_widen_the_axis():
    histogram = TypicalRanges().fit("tag", histogram_of(np.append(normal(), 1000.0)))
    assert histogram.edges[-1] < 100 and histogram.counts.sum() == 10001
    assert (np.diff(histogram.edges) > 0).all()


def test_a_step_that_explodes_does_not_widen_the_axis_of_the_others():
    ranges = TypicalRanges()
    before = [ranges.fit("tag", histogram_of(normal(seed=seed))) for seed in range(5)]
    exploded = ranges.fit("tag", histogram_of(normal(scale=1e6)))
    widest = max(abs(histogram.edges).max() for histogram in before)
    assert abs(exploded.edges).max() < 20 * widest
    # Nearly all of it is at the ends.
    assert exploded.counts[[0, -1]].sum() > 0.99 * exploded.counts.sum()
    assert ranges.fit("other", histogram_of(normal(scale=1e6))).edges[-1] > 1e6


def test_growth_is_followed():
    ranges = TypicalRanges()
    for step in range(200):
        scale = 1.02**step
        histogram = ranges.fit("tag", histogram_of(normal(seed=step, scale=scale)))
        assert histogram.edges[-1] > 3 * scale


def test_state_goes_on():
    first, second = TypicalRanges(), TypicalRanges()
    for seed in range(3):
        first.fit("tag", histogram_of(normal(seed=seed)))
    second.load_state_dict(first.state_dict())
    histogram = histogram_of(normal(scale=1e4))
    assert np.array_equal(first.fit("tag", histogram).edges, second.fit("tag", histogram).edges)


def test_bins_of_float64_become_those_of_float32():
    x = torch.as_tensor(np.concatenate([normal(), normal(scale=1e30), [0.0, -np.inf, np.inf]]))
    # Rounding to float32 could bring a value into the next bin.
    x = x.float().double()
    np.testing.assert_array_equal(narrowed(count_values(x).numpy()), count_values(x.float()).numpy())
    bins = count_values(x.float()).numpy()
    assert narrowed(bins) is bins


def test_what_float32_cannot_hold_is_neither_zero_nor_infinite():
    bins = count_values(torch.tensor([1e-60, -1e-60, 1e60, -1e60, 0.0], dtype=torch.float64)).numpy()
    assert num_zero(bins) == num_zero(narrowed(bins)) == 1
    finite = finite_histogram(narrowed(bins), -3.4e38, 3.4e38, 0.0, 0.0)
    assert finite.counts.sum() == 5 and len(narrowed(bins)) == NUM_BINS
