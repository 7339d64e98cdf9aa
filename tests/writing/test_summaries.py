import numpy as np
import pytest

from bnlightning.monitors.counting.histogram import Histogram
from bnlightning.monitors.counting.layer_statistics import gradient_catalogue, layer_catalogue
from bnlightning.monitors.counting.norm_statistics import norm_catalogue
from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.record import Entry, Record
from bnlightning.writing.summaries import summarize

CATALOGUES = [layer_catalogue(), gradient_catalogue(), norm_catalogue(), parameter_catalogue()]
HISTOGRAM = Histogram(np.array([0.0, 1.0]), np.array([3]), 1.5, 1.0)


def record(phase):
    return Record(
        7,
        phase,
        layers={"net.0#1": Entry({"dead": 0.5, "grad_mean": 0.1}, {"hist": HISTOGRAM})},
        norms={"net.1": Entry({"mean_drift": 0.2})},
        parameters={"net.0.weight": Entry({"grad_norm": 2.0}, {"grad_hist": HISTOGRAM})},
        health={"dead": 0.25},
        texts={"watched": "one layer"},
    )


def test_every_number_has_a_tag():
    told = summarize(record("train"), CATALOGUES)
    assert told.step == 7
    assert told.scalars == {
        "layer_dead/net.0#1": 0.5,
        "layer_grad_mean/net.0#1": 0.1,
        "norm_mean_drift/net.1": 0.2,
        "param_grad_norm/net.0.weight": 2.0,
        "health/dead": 0.25,
    }
    assert set(told.histograms) == {"layer_hist/net.0#1", "param_grad_hist/net.0.weight"}
    assert told.texts == {"health/watched": "one layer"}


@pytest.mark.parametrize("phase", ["val", "test"])
def test_an_evaluation_has_its_phase_before_the_statistic(phase):
    told = summarize(record(phase), CATALOGUES)
    assert {f"layer_{phase}_dead/net.0#1", f"health/{phase}_dead"} <= set(told.scalars)
    assert f"layer_{phase}_hist/net.0#1" in told.histograms
    # A text is about the network, not about the phase in which it is told first.
    assert set(told.texts) == {"health/watched"}
    assert "layer_dead/net.0#1" not in told.scalars


@pytest.mark.parametrize("phase", ["train", "val"])
def test_every_tag_is_described(phase):
    told = summarize(record(phase), CATALOGUES)
    for tag in [*told.scalars, *told.histograms]:
        text = told.describe(tag)
        assert len(text) > 30 and text.endswith("."), (tag, text)
    assert told.describe("health/watched") and told.describe("somebody/else") is None
