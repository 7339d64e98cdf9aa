import copy

import pytest
import torch
from torch import nn

from bnlightning.monitors.gradients import Gradients, by_path


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def stepped(monitor, module, optimizer, step=0, scale=1.0):
    optimizer.zero_grad()
    (scale * module(torch.ones(4, 3)).square().mean()).backward()
    monitor.open(step)
    monitor.take(module.parameters(), scale)
    if scale == 1.0:
        optimizer.step()
    return monitor.close()


def test_a_plain_loop_against_norms_in_float64():
    module, monitor = network(), Gradients()
    monitor.attach(module)
    before = copy.deepcopy(module)
    record = stepped(monitor, module, torch.optim.SGD(module.parameters(), lr=0.1), step=3)
    assert record.step == 3 and set(record.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    norms = {}
    for path, parameter in module.named_parameters():
        gradient, old = parameter.grad.double(), before.get_parameter(path).double()
        numbers = record.parameters[path].numbers
        norms[path] = gradient.norm().item()
        assert numbers["grad_norm"] == pytest.approx(norms[path], rel=1e-6)
        assert numbers["grad_rms"] == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-6)
        assert numbers["update_ratio"] == pytest.approx(((parameter - old).norm() / old.norm()).item(), rel=1e-4)
        assert record.parameters[path].histograms["grad_hist"].counts.sum() == gradient.numel()
    assert record.health["grad_norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-6)
    weights = [norms["0.weight"], norms["2.weight"]]
    assert record.health["grad_norm_ratio"] == pytest.approx(max(weights) / min(weights), rel=1e-6)


def test_the_scale_is_taken_out():
    module, monitor = network(), Gradients()
    monitor.attach(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaled = stepped(monitor, module, optimizer, scale=1024.0)
    plain = stepped(monitor, module, optimizer)
    assert scaled.health["grad_norm"] == pytest.approx(plain.health["grad_norm"], rel=1e-5)


def test_parameters_are_chosen_in_their_order_and_health_is_over_all():
    module, monitor = network(), Gradients("*.weight", max_parameters=1)
    monitor.attach(module)
    assert (list(monitor.chosen), list(monitor.left_out)) == (["0.weight"], ["2.weight"])
    record = stepped(monitor, module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert set(record.parameters) == {"0.weight"}
    everything = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert record.health["grad_norm"] == pytest.approx(everything.double().norm().item(), rel=1e-6)


def test_what_was_taken_before_an_exception_makes_no_record():
    module, monitor = network(), Gradients()
    monitor.attach(module)
    module(torch.ones(4, 3)).sum().backward()
    monitor.open(0)
    monitor.take(module.parameters())
    monitor.abandon()
    assert monitor.close() is None
    # Nothing is open: what is taken goes nowhere.
    monitor.take(module.parameters())
    assert monitor.close() is None


def test_a_shared_parameter_stands_under_its_first_path():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert list(by_path(module)) == ["0.weight", "0.bias", "1.bias"]


def test_to_take_without_a_network_is_refused():
    monitor = Gradients()
    monitor.open(0)
    with pytest.raises(RuntimeError, match="call attach"):
        monitor.take(network().parameters())
