import copy
import pickle

import pytest
import torch
from torch import nn

from bnlightning.monitors.norms import Norms


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_a_plain_loop_against_the_formulas_in_float64():
    module, monitor = network(), Norms()
    module(normal(20, 3))
    monitor.attach(module)
    mean, var = module[0].running_mean.double().clone(), module[0].running_var.double().clone()
    x = torch.cat([normal(40, 3, seed=1) + 1, normal(10, 3, seed=2)])
    monitor.open(5)
    for part in x.split(25):
        monitor.observe()
        module(part)
        monitor.pause()
    record = monitor.close()
    assert record.step == 5 and set(record.norms) == {"0", "2"}
    numbers, x = record.norms["0"].numbers, x.double()
    drift = (mean - x.mean(0)).abs() / (var + 1e-5).sqrt()
    assert numbers["mean_drift"] == pytest.approx(drift.max().item(), rel=1e-5)
    ratio = ((var + 1e-5) / (x.var(0) + 1e-5)).log().abs()
    assert numbers["var_drift"] == pytest.approx(ratio.max().item(), rel=1e-5)
    assert numbers["min_running_var"] == pytest.approx(var.min().item(), rel=1e-6)
    assert record.health["norm_mean_drift"] == max(entry.numbers["mean_drift"] for entry in record.norms.values())


def test_what_is_called_between_samples_does_not_count():
    module, monitor = network(), Norms()
    monitor.attach(module)
    monitor.observe()
    module(normal(20, 3))
    assert monitor.close() is None
    monitor.open(0)
    # Nobody said that a batch begins: an evaluation, say.
    module(normal(20, 3))
    assert monitor.close() is not None and monitor.saw_nothing


def test_layers_are_watched_in_their_order_up_to_the_maximum():
    monitor = Norms(max_layers=1)
    monitor.attach(network())
    assert (monitor.watched, monitor.left_out) == (["0"], ["2"])
    monitor.detach()


def test_a_copy_in_the_middle_of_a_sample_has_no_part_in_it():
    module, monitor = network(), Norms()
    monitor.attach(module)
    monitor.open(0)
    for copied in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert not copied.is_open and copied.close() is None
    copied = copy.deepcopy(module)
    monitor.observe()
    copied(normal(20, 3))
    assert monitor.close() is not None and monitor.saw_nothing


def test_a_network_without_batch_norm_makes_no_record():
    monitor = Norms()
    monitor.attach(nn.Linear(3, 3))
    monitor.open(0)
    monitor.observe()
    assert not monitor.watched and not monitor.is_open and monitor.close() is None
