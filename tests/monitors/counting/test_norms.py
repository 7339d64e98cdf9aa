import pytest
import torch
from torch import nn

from bnlightning.monitors.counting.norms import NormAccumulators

CPU = torch.device("cpu")


def normal(*shape, seed=0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_moments_are_those_of_all_calls_together(shift):
    layer = nn.BatchNorm2d(3)
    layer(normal(8, 3, 4, 4, shift=shift))
    accumulators = NormAccumulators([layer], CPU)
    accumulators.start()
    running_mean, running_var = layer.running_mean.double().clone(), layer.running_var.double().clone()
    parts = [normal(5, 3, 4, 4, seed=1, shift=shift), normal(2, 3, 6, 6, seed=2, shift=shift)]
    for part in parts:
        accumulators.update(0, part)
    accumulators.reduce()
    (counts,) = accumulators.statistics()
    x = torch.cat([part.double().movedim(1, 0).flatten(1) for part in parts], dim=1)
    drift = ((running_mean - x.mean(1)).abs() / (running_var + layer.eps).sqrt()).max()
    assert counts.mean_drift == pytest.approx(drift.item(), rel=1e-4)
    ratio = ((running_var + layer.eps) / (x.var(1) + layer.eps)).log().abs().max()
    assert counts.var_drift == pytest.approx(ratio.item(), rel=1e-3, abs=1e-4)
    assert (counts.channels, counts.scales, counts.seen, counts.rank_spread) == (3, 3, True, None)


def test_a_layer_that_did_not_run_has_what_it_held():
    layer = nn.BatchNorm1d(2)
    with torch.no_grad():
        layer.running_var.copy_(torch.tensor([0.5, 2.0]))
        layer.weight.copy_(torch.tensor([0.0, 1.0]))
    accumulators = NormAccumulators([layer], CPU)
    accumulators.start()
    accumulators.reduce()
    (counts,) = accumulators.statistics()
    assert (counts.seen, counts.mean_drift, counts.min_running_var, counts.scale_near_zero) == (False, None, 0.5, 0.5)


def test_what_a_layer_would_refuse_is_passed_over():
    accumulators = NormAccumulators([nn.BatchNorm1d(3)], CPU)
    accumulators.start()
    for odd in (torch.ones(4, 5), torch.ones(3), torch.ones(0, 3), torch.ones(4, 3, dtype=torch.int64)):
        accumulators.update(0, odd)
    accumulators.reduce()
    assert not accumulators.statistics()[0].seen


def test_a_tiny_running_variance_of_float64_is_not_zero():
    layer = nn.BatchNorm1d(2, eps=0.0, dtype=torch.float64)
    with torch.no_grad():
        layer.running_var.copy_(torch.tensor([1e-60, 2e-60], dtype=torch.float64))
    layer.num_batches_tracked += 1
    accumulators = NormAccumulators([layer], CPU)
    accumulators.start()
    x = torch.randn(50, 2, dtype=torch.float64) * 1e-30
    accumulators.update(0, x)
    accumulators.reduce()
    (counts,) = accumulators.statistics()
    assert counts.min_running_var == 1e-60
    ratio = (layer.running_var / x.var(0)).log().abs().max().item()
    assert counts.var_drift == pytest.approx(ratio, rel=1e-6)
