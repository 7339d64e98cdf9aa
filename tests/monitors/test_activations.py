import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from helpers import run_on_ranks
from torch import nn

from bnlightning import tap
from bnlightning.monitors.activations import Activations
from bnlightning.monitors.counting.layer_statistics import LayerCounts, layer_statistics
from bnlightning.monitors.counting.layers import Sum
from bnlightning.monitors.statistic import Look, Statistic


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())


def sampled(monitor, module, *batches, step=0, phase="train"):
    monitor.open(step, phase)
    for batch in batches:
        monitor.observe(phase)
        module(batch)
        monitor.pause()
    return monitor.close(phase)


def test_a_plain_loop_against_numpy():
    module, batches = network(), [normal(452, 4), normal(8, 4, seed=1)]
    monitor = Activations()
    monitor.attach(module)
    record = sampled(monitor, module, *batches, step=7)
    monitor.detach()
    x = torch.cat(batches)
    outputs = {"1": module[:2](x), "3": module(x)}
    assert (record.step, record.phase, list(record.layers)) == (7, "train", ["1", "3"])
    for path, output in outputs.items():
        values, entry = output.detach().double().numpy(), record.layers[path]
        assert (entry.units, entry.samples, entry.is_activation) == (values.shape[1], 460, True)
        assert entry.numbers["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert entry.numbers["dead"] == (values == 0).all(axis=0).mean()
        assert entry.histograms["hist"].counts.sum() == values.size == entry.bins.sum()
    assert "saturated" in record.layers["3"].numbers and "saturated" not in record.layers["1"].numbers
    dead = [record.layers[path].numbers["dead"] * record.layers[path].units for path in outputs]
    assert record.health["dead"] == pytest.approx(sum(dead) / 24)
    assert not any(part._forward_hooks for part in module.modules())


def test_without_a_sample_there_is_no_record():
    module, monitor = network(), Activations()
    monitor.attach(module)
    monitor.observe()
    module(normal(2, 4))
    assert monitor.close() is None and not monitor.is_open()


def test_an_evaluation_amid_a_training_sample_is_a_record_of_its_own():
    module, monitor = network(), Activations()
    monitor.attach(module)
    monitor.open(3)
    monitor.observe()
    module(normal(10, 4))
    record = sampled(monitor, module, normal(6, 4), step=4, phase="val")
    assert (record.phase, record.step, record.layers["1"].samples) == ("val", 4, 6)
    monitor.observe()
    module(normal(10, 4))
    assert monitor.close().layers["1"].samples == 20


def test_units_are_over_the_window_in_training_and_over_all_of_an_evaluation():
    module, monitor = network(), Activations(window_samples=15)
    monitor.attach(module)
    seen = [sampled(monitor, module, normal(10, 4)).layers["1"].samples for _ in range(6)]
    # Two generations of at least 15 samples.
    assert seen == [10, 20, 30, 40, 30, 40]
    assert sampled(monitor, module, normal(10, 4), phase="val").layers["1"].samples == 10


def test_a_training_that_goes_on_keeps_the_window_and_one_that_begins_anew_does_not():
    module, monitor = network(), Activations()
    monitor.attach(module)
    sampled(monitor, module, normal(10, 4))
    resumed = Activations()
    resumed.load_state_dict(copy.deepcopy(monitor.state_dict()))
    resumed.attach(module)
    assert sampled(resumed, module, normal(10, 4)).layers["1"].samples == 20
    resumed.forget()
    assert sampled(resumed, module, normal(10, 4)).layers["1"].samples == 10


def test_gradients_of_outputs_are_numbers_of_the_layer():
    module, x, monitor = network(), normal(20, 4), Activations()
    monitor.attach(module)
    monitor.open(0, grad_scale=0.5)
    monitor.observe()
    module(x).square().mean().backward()
    entry = monitor.close().layers["3"]
    output = module(x)
    gradient = 0.5 * torch.autograd.grad(output.square().mean(), output)[0].double().numpy()
    assert entry.numbers["grad_std"] == pytest.approx(gradient.std(), rel=1e-5)
    assert {"std", "grad_std"} <= set(entry.numbers) and set(entry.histograms) == {"hist", "grad_hist"}


# A statistic of somebody else's: one declaration, with a sum of its own and a picture.
FOURTH_POWERS = Sum("fourth_powers", lambda key: (), lambda call: call.fill(0.0).double().pow(4).sum())
KURTOSIS = Statistic[LayerCounts](
    "kurtosis",
    lambda layer: float(layer.values.sums["fourth_powers"]) * layer.values.finite / layer.values.sum_squares**2,
    "Mean fourth power over the squared mean square of the finite outputs, over one sampled step.",
    "Below about 10.",
    sum=FOURTH_POWERS,
    look=Look("kurtosis", high=100.0, ticks={0.0: "0", 100.0: "100"}),
)


def test_a_declaration_from_outside_is_a_number_of_every_layer():
    module, x = network(), normal(200, 4)
    monitor = Activations(statistics=[*layer_statistics(), KURTOSIS])
    monitor.attach(module)
    record = sampled(monitor, module, x[:50], x[50:])
    for path, output in {"1": module[:2](x), "3": module(x)}.items():
        values = output.detach().double().numpy()
        expected = (values**4).mean() / (values**2).mean() ** 2
        assert record.layers[path].numbers["kurtosis"] == pytest.approx(expected, rel=1e-5)
    assert monitor.catalogues[0].looks()["kurtosis"] is KURTOSIS.look
    assert monitor.catalogues[0].description("kurtosis").startswith("Mean fourth power")


def test_a_tap_is_a_layer():
    monitor = Activations()
    monitor.attach(network())
    monitor.open(0)
    monitor.observe()
    tap(torch.zeros(500, 3), "shown")
    assert monitor.close().layers["shown"].numbers["dead"] == 1.0
    monitor.detach()


def test_the_check_names_the_module_that_made_the_first_nonfinite_value():
    module, monitor = network(), Activations()
    monitor.attach(module, checks=True)
    for step in range(2):
        monitor.begin_check(step)
        monitor.observe()
        loss = module(normal(4, 4)).sum()
        monitor.check_loss(loss)
        assert monitor.end_check()
        assert (monitor.first_nonfinite() is None) is (step == 0)
        with torch.no_grad():
            module[2].weight[0, 0] = float("inf")
    step, _, place = monitor.first_nonfinite()
    assert (step, str(place)) == (1, "parameter 2.weight")


def test_training_is_the_same_with_and_without():
    def trained(watched):
        module, monitor = network(), Activations()
        if watched:
            monitor.attach(module, checks=True)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(5):
            monitor.open(step, grad_scale=1.0) if watched else None
            monitor.begin_check(step)
            monitor.observe()
            loss = module(normal(16, 4, seed=step)).square().mean()
            monitor.check_loss(loss)
            loss.backward()
            monitor.end_check()
            optimizer.step()
            optimizer.zero_grad()
            monitor.close()
        return module.state_dict()

    for one, other in zip(trained(True).values(), trained(False).values(), strict=True):
        assert torch.equal(one, other)


def test_a_monitor_is_pickled_without_the_network():
    module, monitor = network(), Activations()
    monitor.attach(module)
    sampled(monitor, module, normal(10, 4))
    monitor.detach()
    copied = pickle.loads(pickle.dumps(monitor))
    copied.attach(module)
    assert sampled(copied, module, normal(10, 4)).layers["1"].samples == 20


def _record_on_rank(rank):
    module, monitor = network(), Activations(statistics=None)
    monitor.attach(module)
    x = normal(30, 4)
    record = sampled(monitor, module, x[:10] if rank == 0 else x[10:])
    return {path: dict(entry.numbers) for path, entry in record.layers.items()}, dict(record.health)


@pytest.mark.slow
def test_two_ranks_record_what_one_process_records(tmp_path):
    first, second = run_on_ranks(_record_on_rank, 2, tmp_path)
    assert first == second
    module, monitor = network(), Activations()
    monitor.attach(module)
    alone = sampled(monitor, module, normal(30, 4))
    for path, numbers in first[0].items():
        assert numbers == pytest.approx(dict(alone.layers[path].numbers), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(list(first[1].values()), list(alone.health.values()), rtol=1e-6)


def test_two_sums_of_one_name_are_refused():
    other = Statistic(
        "other", lambda layer: 0.0, "It.", "It.", sum=Sum("fourth_powers", lambda key: (), lambda call: 0)
    )
    with pytest.raises(ValueError, match="sums of one name"):
        Activations(statistics=[KURTOSIS, other])
    # One that two statistics share is added up once.
    Activations(statistics=[KURTOSIS, dataclasses.replace(KURTOSIS, name="again")])
