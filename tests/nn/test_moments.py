import numpy as np
import pytest
import torch
from helpers import run_on_ranks

from bnlightning.nn.moments import Moments, merge_over_ranks, world_size

SIZES = [5, 1, 0, 12]


def parts(offset=0.0):
    """Values of three channels in parts of several sizes, and each part's own mean and biased variance."""
    rng = np.random.default_rng(0)
    values = [rng.normal(offset, 2.0, (size, 3)) + k for k, size in enumerate(SIZES)]
    # Over no values both are NaN.
    moments = [
        (part.mean(axis=0), part.var(axis=0)) if len(part) else (np.full(3, np.nan), np.full(3, np.nan))
        for part in values
    ]
    return np.concatenate(values), [(torch.tensor(mean), torch.tensor(var)) for mean, var in moments]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_parts_merge_to_the_moments_of_all_values(offset, as_tensor):
    everything, each = parts(offset)
    merged = Moments(torch.zeros(3))
    for size, (mean, var) in zip(SIZES, each, strict=True):
        merged.add(mean, var, torch.tensor(size) if as_tensor else size)
    assert merged.n == len(everything)
    np.testing.assert_allclose(merged.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.var, everything.var(axis=0), rtol=1e-8)


def test_nothing_added_is_nothing():
    moments = Moments(torch.zeros(2, dtype=torch.float16))
    moments.add(torch.full((2,), torch.nan), torch.full((2,), torch.nan), 0)
    assert moments.n == 0 and moments.mean.tolist() == moments.var.tolist() == [0.0, 0.0]
    assert moments.mean.dtype == torch.float64


def test_one_process_is_a_world_of_one():
    assert world_size() == 1


# Of the parts above: two with values, and one with values beside one without any.
PAIRS = [(0, 3), (2, 0)]


def _merge_pairs(rank):
    moments = parts()[1]
    return [
        merge_over_ranks(SIZES[pair[rank]], *(moment.nan_to_num() for moment in moments[pair[rank]])) for pair in PAIRS
    ]


@pytest.mark.slow
def test_ranks_merge_to_the_moments_of_all_values(tmp_path):
    everything, _ = parts()
    starts = np.cumsum([0, *SIZES])
    for results in run_on_ranks(_merge_pairs, 2, tmp_path):
        for pair, (n, mean, var) in zip(PAIRS, results, strict=True):
            values = np.concatenate([everything[starts[part] : starts[part + 1]] for part in pair])
            assert n == len(values) and n.dtype == torch.float64
            np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(var, values.var(axis=0), rtol=1e-12)
