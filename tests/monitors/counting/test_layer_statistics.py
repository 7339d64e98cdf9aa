import dataclasses

import numpy as np
import pytest
import torch

from bnlightning.monitors.counting.layer_statistics import (
    LayerCounts,
    gradient_catalogue,
    layer_catalogue,
    layer_statistics,
)
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey
from bnlightning.monitors.record import Entry

CPU = torch.device("cpu")
LIMITS = (-0.99, 0.99)


def counts_of(x, **key):
    accumulators, key = LayerAccumulators(), LayerKey("layer", **key)
    accumulators.update(key, x)
    sums = accumulators.reduce(CPU)[key]
    return LayerCounts(key, sums, sums.units, None if sums.units is None else sums.units.fired == 0)


def test_health_of_several_layers():
    layers = []
    for x, limits in ((torch.tensor([[0.0, 1.0, 0.0, 0.0]]), None), (torch.tensor([[0.0, 1.0]]), LIMITS)):
        counts = counts_of(x, is_activation=True, units=x.shape[1], limits=limits)
        layers.append(Entry(layer_catalogue().numbers(counts), units=counts.key.units))
    assert layer_catalogue().health(layers) == {
        "dead": 4 / 6,
        "dead_max": 3 / 4,
        "dormant": 4 / 6,
        "nonfinite": 0.0,
        "saturated": 0.5,
    }
    assert layer_catalogue().health([]) == {}


def test_saturation_is_a_matter_of_bounded_activations():
    x = torch.tensor([[0.0, 1.0]])
    numbers = [layer_catalogue().numbers(counts_of(x, units=2, limits=limits)) for limits in (None, LIMITS)]
    assert [{name for name in each if name.startswith("saturated")} for each in numbers] == [
        set(),
        {"saturated", "saturated_low", "saturated_high", "saturated_units"},
    ]


def test_gradients_have_the_numbers_that_any_values_have():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    numbers = gradient_catalogue().numbers(counts_of(x, is_gradient=True))
    assert numbers.keys() == {f"grad_{name}" for name in ("mean", "std", "min", "max", "zero", "nonfinite")}
    assert numbers["grad_mean"] == pytest.approx(float(x.mean()), rel=1e-5)


def test_dead_units_are_dormant_and_rarely_active_at_once():
    """Also while the window still holds samples for which they fired."""
    counts = counts_of(torch.rand(10, 4, generator=torch.Generator().manual_seed(0)), is_activation=True, units=4)
    counts = dataclasses.replace(counts, dead=np.array([True, False, True, False]))
    numbers = layer_catalogue().numbers(counts)
    assert (numbers["dead"], numbers["dormant"], numbers["rarely_active"]) == (0.5, 0.5, 0.5)


def test_tau_says_which_units_are_dormant():
    counts = counts_of(torch.tensor([[1.0, 0.02, 0.0]]), is_activation=True, units=3)
    shares = [layer_catalogue(layer_statistics(tau)).numbers(counts)["dormant"] for tau in (0.0, 0.1, 10.0)]
    assert shares == [1 / 3, 2 / 3, 1.0]
