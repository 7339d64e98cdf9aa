import pytest

from bnlightning.monitors.counting.norm_statistics import norm_catalogue
from bnlightning.monitors.counting.norms import NormCounts


def counts(**numbers):
    defaults = {
        "channels": 4, "scales": 4, "seen": True, "mean_drift": 0.5, "var_drift": 0.25, "rank_spread": None,
        "scale_near_zero": 0.25, "min_running_var": 2.0, "nonfinite": 0.0,
    }  # fmt: skip
    return NormCounts(**(defaults | numbers))


def test_what_a_layer_does_not_have_is_no_number():
    assert norm_catalogue().numbers(counts()) == {
        "mean_drift": 0.5,
        "var_drift": 0.25,
        "scale_near_zero": 0.25,
        "min_running_var": 2.0,
    }
    assert norm_catalogue().numbers(counts(nonfinite=0.5))["nonfinite"] == 0.5


def test_the_worst_layer_counts_and_shares_are_over_all_entries():
    layers = [counts(), counts(mean_drift=3.0, min_running_var=0.5, scales=12, scale_near_zero=1.0, channels=12)]
    health = norm_catalogue().health([*layers, counts(mean_drift=None, nonfinite=1.0)])
    assert (health["norm_mean_drift"], health["norm_min_running_var"]) == (3.0, 0.5)
    assert health["norm_scale_near_zero"] == pytest.approx((1 + 12 + 1) / 20)
    assert health["norm_nonfinite"] == pytest.approx(4 / 20)
    assert "norm_rank_spread" not in health
    assert norm_catalogue().health([]) == {}
