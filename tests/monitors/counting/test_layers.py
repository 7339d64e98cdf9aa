import numpy as np
import pytest
import torch
from helpers import run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from bnlightning.monitors.counting.histogram import finite_histogram
from bnlightning.monitors.counting.layer_statistics import (
    EFFECTIVE_RANK,
    SECOND_MOMENTS,
    LayerCounts,
    layer_catalogue,
    layer_statistics,
)
from bnlightning.monitors.counting.layers import CallValues, LayerAccumulators, LayerKey, Sum, _moments, _Row, _table

CPU = torch.device("cpu")
LIMITS = (-0.99, 0.99)


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def statistics(key, layer, units, tau):
    return layer_catalogue([*layer_statistics(tau), EFFECTIVE_RANK]).numbers(LayerCounts(key, layer, units))


TENSORS = {
    "normal": normal(200, 7),
    "far from zero": normal(200, 7, shift=1e4),
    "wide": normal(50, 3) * 10.0 ** normal(50, 3, seed=1, scale=8),
    "tanh": torch.tanh(normal(300, 5, scale=4)),
    "relu": torch.relu(normal(100, 6, shift=-1)),
    "image": torch.relu(normal(4, 3, 8, 8)),
    "channels_last": torch.relu(normal(4, 3, 8, 8)).to(memory_format=torch.channels_last),
    "volume, channels_last": torch.relu(normal(2, 3, 4, 5, 6)).to(memory_format=torch.channels_last_3d),
    "not contiguous": normal(5, 40)[:, ::3].T,
    "sequence": normal(4, 9, 6),
    "vector": normal(11),
    "scalar": torch.tensor(3.0),
    "one value": torch.full((5, 2), 0.25),
    "zeros": torch.zeros(6, 3),
    "negative": -normal(40, 2).abs() - 1,
    "some NaN": normal(30, 4).masked_fill(normal(30, 4, seed=2) > 1, float("nan")),
    "some infinite": normal(30, 4).masked_fill(normal(30, 4, seed=2) > 1, -float("inf")),
    "a unit of NaN": torch.cat([normal(30, 2), torch.full((30, 1), float("nan"))], dim=1),
    "denormal": normal(20, 2) * 1e-40,
    "largest": torch.tensor([[3.4e38, -3.4e38], [0.0, 1.0]]),
}


def key_of(x, dim, limits=LIMITS):
    return LayerKey("layer", True, x.shape[dim] if x.dim() > 1 else 1, limits)


def as_matrix(x, dim):
    """Observations by units."""
    return np.moveaxis(x, dim, -1).reshape(-1, x.shape[dim]) if x.ndim > 1 else x.reshape(-1, 1)


def expected_statistics(x, dim, tau):
    values = x.double().numpy()
    finite = values[np.isfinite(values)]
    matrix = as_matrix(values, dim)
    beyond = np.isfinite(matrix) & (np.abs(matrix) > np.float32(0.99))
    magnitude = np.where(np.isfinite(matrix), np.abs(matrix), 0).mean(axis=0)
    broken = ~np.isfinite(matrix).any(axis=0)
    return {
        "mean": finite.mean(),
        "std": finite.std(),
        "min": finite.min(),
        "max": finite.max(),
        "zero": np.mean(np.abs(finite) < 2.0**-129),
        "nonfinite": 1 - finite.size / values.size,
        "saturated": np.mean(np.abs(finite) > np.float32(0.99)),
        "saturated_low": np.mean(finite < -np.float32(0.99)),
        "saturated_high": np.mean(finite > np.float32(0.99)),
        "dormant": np.mean((magnitude <= tau * magnitude.mean()) & ~broken),
        "rarely_active": np.mean((matrix != 0).mean(axis=0) < 0.01),
        "saturated_units": np.mean(beyond.mean(axis=0) >= 0.95),
    }


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dim", [1, -1])
def test_numbers_against_numpy_in_float64(name, dim):
    x = TENSORS[name]
    dim = dim % max(x.dim(), 1)
    window, key = LayerAccumulators(), key_of(x, dim)
    # In two unequal parts, where there are several samples.
    for part in x.tensor_split([len(x) // 3]) if x.dim() else [x]:
        window.update(key, part, dim)
    layer = window.reduce(CPU)[key]
    found = statistics(key, layer, layer.units, tau=0.7)
    by_sample = as_matrix(x.numpy() != 0, dim).reshape(len(x), -1, layer.units.nonzero.size) if x.dim() > 1 else None
    if by_sample is not None:
        assert layer.units.fired.tolist() == by_sample.any(axis=1).sum(axis=0).tolist()
    expected = expected_statistics(x, dim, tau=0.7)
    assert found.keys() == expected.keys()
    scale = float(x[x.isfinite()].abs().max())
    for statistic, value in expected.items():
        absolute = 1e-6 * scale if statistic in ("mean", "std") else 1e-12
        relative = 1e-5 if statistic == "std" else 1e-6
        assert found[statistic] == pytest.approx(value, rel=relative, abs=absolute), statistic
    if name == "far from zero":
        assert found["std"] == pytest.approx(expected["std"], rel=1e-4)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e5])
def test_a_standard_deviation_far_from_zero(mean):
    # What float32 itself leaves of the values is exact in float64.
    x = normal(500, 20, shift=mean)
    window, key = LayerAccumulators(), LayerKey("layer")
    for part in x.split(100):
        window.update(key, part)
    layer = window.reduce(CPU)[key]
    assert statistics(key, layer, None, 0.0)["std"] == pytest.approx(x.double().std(correction=0).item(), rel=2e-5)


@pytest.mark.parametrize("name", TENSORS)
def test_histogram_counts_every_finite_value_in_the_right_bin(name):
    x = TENSORS[name]
    window, key = LayerAccumulators(), LayerKey("layer")
    window.update(key, x)
    layer = window.reduce(CPU)[key]
    histogram = finite_histogram(layer.bins, layer.minimum, layer.maximum, layer.sum, layer.sum_squares)
    finite = x[x.isfinite()].double().numpy().ravel()
    assert histogram.counts.sum() == finite.size and len(histogram.edges) == len(histogram.counts) + 1
    assert (np.diff(histogram.edges) > 0).all()
    assert histogram.edges[0] <= finite.min() and histogram.edges[-1] >= finite.max()
    if finite.min() < finite.max():
        assert histogram.edges[0] == finite.min() and histogram.edges[-1] == finite.max()
    # Cumulative counts at every edge; a value that lies on an edge may count on either side of it.
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)])
    ordered = np.sort(finite)
    assert (cumulative >= np.searchsorted(ordered, histogram.edges, side="left")).all()
    assert (cumulative <= np.searchsorted(ordered, histogram.edges, side="right")).all()
    assert histogram.sum == pytest.approx(finite.sum(), rel=1e-6, abs=1e-6 * np.abs(finite).max())
    # 5 octaves of 8 bins on each side, the one above them, and two around zero.
    assert len(histogram.counts) <= 2 * 8 * 6 + 2


def test_a_layer_without_a_finite_value():
    x = torch.full((4, 3), float("nan"))
    window, key = LayerAccumulators(), key_of(x, 1)
    window.update(key, x)
    layer = window.reduce(CPU)[key]
    found = statistics(key, layer, layer.units, 0.025)
    assert found == {"nonfinite": 1.0, "dormant": 0.0, "rarely_active": 0.0, "saturated_units": 0.0}
    assert layer.units.fired.tolist() == [4, 4, 4]
    assert layer.minimum > layer.maximum


def test_a_layer_of_zeros_is_dormant_all_over():
    window, key = LayerAccumulators(), LayerKey("layer", True, 3)
    window.update(key, torch.zeros(5, 3))
    layer = window.reduce(CPU)[key]
    found = statistics(key, layer, layer.units, 0.0)
    assert (found["dormant"], found["rarely_active"], found["zero"]) == (1.0, 1.0, 1.0)


def test_a_reset_window_knows_nothing():
    window, key = LayerAccumulators(), LayerKey("layer", True, 3)
    window.update(key, normal(5, 3))
    before = window.reduce(CPU)[key]
    window.reset()
    assert window.reduce(CPU) == {}
    window.update(key, normal(5, 3))
    after = window.reduce(CPU)[key]
    assert (before.sum, before.minimum, before.maximum) == (after.sum, after.minimum, after.maximum)
    np.testing.assert_array_equal(before.bins, after.bins)
    np.testing.assert_array_equal(before.units.magnitude, after.units.magnitude)


def test_an_empty_batch():
    window = LayerAccumulators()
    window.update(LayerKey("layer", True, 3), torch.zeros(0, 3))
    assert window.reduce(CPU) == {}


def test_values_of_inference_mode_and_others_go_together():
    window, key = LayerAccumulators(), LayerKey("layer", True, 3)
    x = normal(8, 3)
    with torch.inference_mode():
        window.update(key, x[:4] * 1.0)
    window.update(key, x[4:])
    assert window.reduce(CPU)[key].sum == pytest.approx(x.sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_counted_in_float32(dtype):
    x, key = normal(100, 4, scale=3).to(dtype), LayerKey("layer", True, 4)
    windows = [LayerAccumulators() for _ in range(2)]
    windows[0].update(key, x)
    windows[1].update(key, x.float())
    first, second = (window.reduce(CPU)[key] for window in windows)
    np.testing.assert_array_equal(first.bins, second.bins)
    assert (first.sum, first.sum_squares) == (second.sum, second.sum_squares)


@pytest.mark.parametrize(("samples", "units", "rank"), [(2000, 10, 10), (2000, 10, 3), (5, 8, 5)])
def test_effective_rank_against_the_singular_values(samples, units, rank):
    x = normal(samples, rank) @ normal(rank, units, seed=1)
    window, key = LayerAccumulators([SECOND_MOMENTS]), LayerKey("layer", True, units)
    for part in x.split(700):
        window.update(key, part)
    layer = window.reduce(CPU)[key]
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = singular[:rank] / singular[:rank].sum()
    assert statistics(key, layer, layer.units, 0.0)["effective_rank"] == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-3
    )


def test_effective_rank_of_an_image_is_over_positions():
    x = normal(6, 4, 5, 5)
    window, key = LayerAccumulators([SECOND_MOMENTS]), LayerKey("layer", True, 4)
    window.update(key, x.to(memory_format=torch.channels_last), 1)
    matrix = as_matrix(x.numpy(), 1)
    np.testing.assert_allclose(window.reduce(CPU)[key].sums["second_moments"], matrix.T @ matrix, rtol=1e-5)


def test_a_unit_that_fires_at_few_positions_is_rarely_active():
    x = torch.ones(2, 2, 20, 20)
    x[:, 0] = 0.0
    x[:, 0, 0, :2] = 1.0
    window, key = LayerAccumulators(), LayerKey("layer", True, 2)
    window.update(key, x, 1)
    layer = window.reduce(CPU)[key]
    # In 4 of 800 samples and positions, of 1 % of which fewer than 8 are.
    assert statistics(key, layer, layer.units, 0.025)["rarely_active"] == 0.5


def test_a_statistic_brings_accumulators_of_its_own():
    fourth = Sum("fourth_powers", lambda key: (), lambda call: call.fill(0.0).double().pow(4).sum())
    largest = Sum("largest", lambda key: (key.units,), lambda call: call.by_unit(call.fill(0.0)).amax(0), True)
    nowhere = Sum("nowhere", lambda key: None, lambda call: call.x.sum())
    x = normal(40, 6, shift=-5)
    accumulators, key = LayerAccumulators([fourth, largest, nowhere]), LayerKey("layer", True, 6)
    for _ in range(2):
        # What was before is forgotten, also of maxima below zero.
        accumulators.reset()
        for part in x.split(15):
            accumulators.update(key, part)
        sums = accumulators.reduce(CPU)[key].sums
    assert set(sums) == {"fourth_powers", "largest"}
    assert sums["fourth_powers"] == pytest.approx(float((x.double() ** 4).sum()))
    np.testing.assert_array_equal(sums["largest"], x.amax(0).numpy())


class Operations(TorchDispatchMode):
    """How many there are, each of which would be launched on a GPU."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_device", [True, False])
def test_the_numbers_of_all_layers_are_packed_by_few_operations(on_device):
    def packed(number):
        rng = np.random.default_rng(0)
        rows = [_Row(LayerKey(str(index)), CPU, []) for index in range(number)]
        expected = []
        # The last layer has not run on this rank.
        for row in rows[:-1]:
            finite, shift, total, squares = rng.integers(1, 100), *rng.normal(size=3)
            values = [float(each) for each in (finite, shift, total, squares)]
            row.finite, row.shift, row.total, row.squares = map(torch.tensor, values) if on_device else values
            low, high = sorted(rng.normal(size=2))
            row.minimum, row.maximum = map(torch.tensor, (low, high)) if on_device else (low, high)
            shift -= (low + high) / 2
            expected.append((total + finite * shift, squares + 2 * shift * total + finite * shift**2))
        ends = [[-row.minimum, row.maximum] for row in rows]
        with Operations() as operations:
            extrema = _table(ends, torch.float64, CPU)
            moments = _moments(rows, extrema, CPU)
            counts = _table([[row.finite, row.samples, row.numel] for row in rows], torch.int64, CPU)
        np.testing.assert_allclose(moments.numpy(), [*expected, (0.0, 0.0)], rtol=1e-4)
        assert counts.tolist() == [[int(row.finite), 0, 0] for row in rows]
        return operations.number

    assert packed(300) == packed(3)


RELU, TANH, ONLY = (
    LayerKey("relu", True, 6),
    LayerKey("tanh", True, 4, LIMITS),
    LayerKey("only"),
)


def _reduce_on_rank(rank, parts):
    window = LayerAccumulators([SECOND_MOMENTS])
    collectives = []

    def counted(real):
        return lambda *args, **options: (collectives.append(real), real(*args, **options))[1]

    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
    for key, x in parts[rank].items():
        window.update(key, x)
    return window.reduce(CPU), len(collectives)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_what_one_process_gives(world_size, tmp_path):
    values = {
        RELU: torch.relu(normal(10, 6, shift=-1.5)),
        TANH: torch.tanh(normal(11, 4, scale=3)),
        ONLY: normal(3, 2, shift=1e3),
    }
    # Unequal parts; the last rank has no relu, the last module runs on one rank only.
    parts = [{} for _ in range(world_size)]
    for key in (RELU, TANH):
        number = world_size - (key is RELU)
        for part, own in zip(values[key].tensor_split(number), parts, strict=False):
            own[key] = part
    parts[1][ONLY] = values[ONLY]
    single = LayerAccumulators([SECOND_MOMENTS])
    for key, x in values.items():
        single.update(key, x)
    expected = single.reduce(CPU)
    for found, collectives in run_on_ranks(_reduce_on_rank, world_size, tmp_path, parts):
        # Keys that differ cost two more than those that do not; layers cost nothing.
        assert collectives == 6 and found.keys() == expected.keys()
        for key, layer in expected.items():
            mine = found[key]
            np.testing.assert_array_equal(mine.bins, layer.bins)
            assert (mine.minimum, mine.maximum) == (layer.minimum, layer.maximum)
            assert mine.sum == pytest.approx(layer.sum, rel=1e-6)
            numbers, theirs = (statistics(key, each, each.units, 0.025) for each in (mine, layer))
            assert numbers == pytest.approx(theirs, rel=1e-5)
            if layer.units is not None:
                assert (mine.units.observations, mine.units.samples) == (len(values[key]),) * 2
                np.testing.assert_array_equal(mine.units.nonzero, layer.units.nonzero)
                np.testing.assert_allclose(
                    mine.sums["second_moments"], layer.sums["second_moments"], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(0.1, 1, 9, dtype=torch.float64) * 1e-60,
        -torch.linspace(0.1, 1, 9, dtype=torch.float64) * 1e60,
        torch.linspace(0.1, 1, 9, dtype=torch.float64) + 1e9,
        torch.tensor([2**24 + 1.0, 2**24 + 3.0, 2**53 - 1.0], dtype=torch.float64),
        torch.tensor([1e300, -1e300, 0.0, torch.nan, torch.inf], dtype=torch.float64),
    ],
    ids=["tiny", "huge", "far from zero", "large integers", "largest"],
)
def test_float64_is_counted_as_it_is(values):
    window, key = LayerAccumulators(), LayerKey("layer", True, 1, is_wide=True)
    for part in (values[:2], values[2:]):
        window.update(key, part)
    layer = window.reduce(CPU)[key]
    exact = values[values.isfinite()].numpy()
    assert (layer.numel, layer.finite) == (len(values), len(exact))
    assert (layer.minimum, layer.maximum) == (exact.min(), exact.max())
    numbers = statistics(key, layer, layer.units, 0.025)
    assert numbers["zero"] == (exact == 0).mean()
    assert layer.units.nonzero.tolist() == [np.count_nonzero(values.numpy())]
    assert numbers["mean"] == pytest.approx(exact.mean(), rel=1e-12, abs=1e-12 * np.abs(exact).max())
    if np.abs(exact).max() < 1e150:
        assert numbers["std"] == pytest.approx(exact.std(), rel=1e-6)
    histogram = finite_histogram(layer.bins, layer.minimum, layer.maximum, layer.sum, layer.sum_squares)
    assert histogram.counts.sum() == len(exact) and (np.diff(histogram.edges) > 0).all()
    np.testing.assert_array_equal(histogram.counts, np.histogram(exact, histogram.edges)[0])


def test_float32_is_not_counted_in_float64():
    x = CallValues(normal(3, 4).half(), -1)
    assert x.x.dtype is torch.float32


def _reduce_far_on_rank(rank):
    window = LayerAccumulators()
    window.update(LayerKey("far", is_wide=True), 1e9 + torch.linspace(0.1, 1, 8, dtype=torch.float64)[rank::2])
    (layer,) = window.reduce(CPU).values()
    return layer.squares_about_mean


def test_ranks_keep_the_digits_of_values_far_from_zero(tmp_path):
    exact = np.linspace(0.1, 1, 8)
    for squares in run_on_ranks(_reduce_far_on_rank, 2, tmp_path):
        assert squares == pytest.approx(((exact - exact.mean()) ** 2).sum(), rel=1e-5)
