import math

import pytest

from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.counting.parameters import ParameterCounts


def counts(norm=3.0, dims=2, values=4, nonfinite=0, weight_norm=2.0, update_norm=0.5):
    return ParameterCounts(dims, values, nonfinite, norm, weight_norm, update_norm, None)


def test_the_numbers_of_a_parameter():
    assert parameter_catalogue().numbers(counts()) == {"grad_norm": 3.0, "grad_rms": 1.5, "update_ratio": 0.25}
    assert parameter_catalogue().numbers(counts(nonfinite=1))["grad_nonfinite"] == 0.25


@pytest.mark.parametrize("norm", [math.nan, math.inf, 1e39])
def test_what_a_float32_cannot_hold_is_left_out(norm):
    found = parameter_catalogue().numbers(counts(norm=norm, update_norm=norm))
    assert "grad_norm" not in found and "update_ratio" not in found


def test_there_is_no_ratio_to_a_weight_of_zero():
    assert "update_ratio" not in parameter_catalogue().numbers(counts(weight_norm=0.0))
    assert "update_ratio" not in parameter_catalogue().health([counts(weight_norm=0.0)])


def test_the_numbers_of_the_network():
    parameters = [counts(norm=4.0), counts(norm=0.0), counts(norm=1.0), counts(norm=8.0, dims=1)]
    health = parameter_catalogue().health(parameters)
    assert health["grad_norm"] == 9.0
    assert health["grad_norm_ratio"] == 4.0
    assert health["grad_zero"] == pytest.approx(1 / 3)
    assert health["grad_nonfinite"] == 0.0
    assert health["update_ratio"] == 0.25
    assert parameter_catalogue().health([]) == {}


def test_beside_a_nan_there_is_no_largest_over_smallest():
    health = parameter_catalogue().health([counts(norm=4.0), counts(norm=math.nan, nonfinite=1)])
    assert "grad_norm_ratio" not in health and health["grad_nonfinite"] == 0.5
