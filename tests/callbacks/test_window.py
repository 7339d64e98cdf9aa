import numpy as np
import pytest
import torch
from helpers import run_on_ranks

from bnlightning.callbacks._window import ActivationWindow, unit_dim

CPU = torch.device("cpu")


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


TENSORS = {
    "normal": normal(200, 7),
    "wide": normal(50, 3) * 10.0 ** normal(50, 3, seed=1, scale=8),
    "tanh": torch.tanh(normal(300, 5, scale=4)),
    "relu": torch.relu(normal(100, 6, shift=-1)),
    "image": torch.relu(normal(4, 3, 8, 8)),
    "sequence": normal(4, 9, 6),
    "vector": normal(11),
    "scalar": torch.tensor(3.0),
    "one value": torch.full((5, 2), 0.25),
    "zeros": torch.zeros(6, 3),
    "negative": -normal(40, 2).abs() - 1,
    "some NaN": normal(30, 4).masked_fill(normal(30, 4, seed=2) > 1, float("nan")),
    "some infinite": normal(30, 4).masked_fill(normal(30, 4, seed=2) > 1, -float("inf")),
    "denormal": normal(20, 2) * 1e-40,
    "largest": torch.tensor([[3.4e38, -3.4e38], [0.0, 1.0]]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_numbers_against_numpy_in_float64(name):
    x = TENSORS[name]
    window = ActivationWindow([(-0.99, 0.99)], CPU)
    # In two unequal parts, where there are several samples.
    for part in x.tensor_split([len(x) // 3]) if x.dim() else [x]:
        window.update(0, part)
    (layer,) = window.statistics()
    values = x.double().numpy()
    finite = values[np.isfinite(values)]
    units = (
        np.moveaxis(values, unit_dim(x), 0).reshape(x.shape[unit_dim(x)], -1) if x.dim() > 1 else values.reshape(1, -1)
    )
    assert layer.units == len(units)
    assert layer.dead == pytest.approx(np.mean((units == 0).all(axis=1)), abs=0)
    assert layer.nonfinite == pytest.approx(1 - finite.size / values.size, abs=1e-15)
    assert layer.zero == pytest.approx(np.mean(finite == 0), abs=0)
    assert layer.saturated == pytest.approx(np.mean(np.abs(finite) > np.float32(0.99)), abs=0)
    assert layer.mean == pytest.approx(finite.mean(), rel=1e-9)
    assert layer.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-9 * np.abs(finite).max())


@pytest.mark.parametrize("name", TENSORS)
def test_histogram_counts_every_finite_value_in_the_right_bin(name):
    x = TENSORS[name]
    window = ActivationWindow([None], CPU)
    window.update(0, x)
    histogram = window.statistics()[0].histogram
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
    assert histogram.sum == pytest.approx(finite.sum(), rel=1e-9, abs=1e-9 * np.abs(finite).max())
    # 8 octaves of 8 bins on each side, and two around zero.
    assert len(histogram.counts) <= 2 * 8 * 9 + 2


def test_a_layer_without_a_finite_value():
    window = ActivationWindow([(-0.99, 0.99)], CPU)
    window.update(0, torch.full((4, 3), float("nan")))
    (layer,) = window.statistics()
    assert (layer.nonfinite, layer.dead, layer.units) == (1.0, 0.0, 3)
    assert layer.histogram is layer.mean is layer.std is layer.zero is layer.saturated is None


def test_a_unit_with_nan_is_not_dead():
    x = torch.zeros(4, 3)
    x[2, 1] = float("nan")
    window = ActivationWindow([None], CPU)
    window.update(0, x)
    assert window.statistics()[0].dead == pytest.approx(2 / 3)


def test_dead_only_if_no_part_of_the_window_fired():
    window = ActivationWindow([None], CPU)
    window.update(0, torch.tensor([[0.0, 0.0, 1.0]]))
    window.update(0, torch.tensor([[0.0, 2.0, 0.0]]))
    assert window.statistics()[0].dead == pytest.approx(1 / 3)


def test_a_module_that_did_not_run_and_an_empty_batch():
    window = ActivationWindow([None, None], CPU)
    window.update(1, torch.zeros(0, 3))
    assert window.statistics() == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_counted_in_float32(dtype):
    x = normal(100, 4, scale=3).to(dtype)
    windows = [ActivationWindow([None], CPU) for _ in range(2)]
    windows[0].update(0, x)
    windows[1].update(0, x.float())
    assert torch.equal(windows[0].bins, windows[1].bins) and torch.equal(windows[0].sums, windows[1].sums)


def _reduce_on_rank(rank, parts):
    window = ActivationWindow([None, (-0.99, 0.99), None], CPU)
    for index, x in enumerate(parts[rank]):
        if x is not None:
            window.update(index, x)
    window.reduce()
    return window.counts, window.bins, window.sums, window.extrema, window.fired


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_what_one_process_gives(world_size, tmp_path):
    relu, tanh = torch.relu(normal(10, 6, shift=-1.5)), torch.tanh(normal(11, 4, scale=3))
    # Unequal parts; the last module runs on one rank only.
    parts = [[r, t, None] for r, t in zip(relu.tensor_split(world_size), tanh.tensor_split(world_size), strict=True)]
    only = normal(3, 2)
    parts[1][2] = only
    results = run_on_ranks(_reduce_on_rank, world_size, tmp_path, parts)
    single = ActivationWindow([None, (-0.99, 0.99), None], CPU)
    for index, x in enumerate((relu, tanh, only)):
        single.update(index, x)
    for counts, bins, sums, extrema, fired in results:
        assert torch.equal(counts, single.counts) and torch.equal(bins, single.bins)
        assert torch.equal(extrema, single.extrema)
        assert fired.keys() == single.fired.keys() and all(torch.equal(fired[key], single.fired[key]) for key in fired)
        torch.testing.assert_close(sums, single.sums, rtol=1e-12, atol=1e-12)
