import pytest

from bnlightning.diagnosis.thresholds import exceeds, make_thresholds
from bnlightning.monitors.counting.layer_statistics import layer_statistics
from bnlightning.monitors.record import Entry, Record


def layer(share, samples=100, is_activation=True):
    return Entry({"dead": share, "dormant": share}, units=10, samples=samples, is_activation=is_activation)


def threshold(statistic="dead", limit=0.5):
    (found,) = make_thresholds({statistic: limit, "saturated": None}, layer_statistics())
    return found


def test_limits_that_are_set_become_thresholds():
    found = make_thresholds({"dead": 0.5, "saturated": 0.9, "dormant": None}, layer_statistics())
    assert {each.statistic: (each.argument, each.limit) for each in found} == {
        "dead": ("warn_dead_above", 0.5),
        "saturated": ("warn_saturated_above", 0.9),
    }


def test_the_worst_layer_is_named_with_its_number_and_cures():
    layers = {"a": layer(0.6), "b": layer(0.9, samples=120), "c": layer(0.2)}
    sentence = exceeds(threshold("dormant"), Record(7, "val", layers=layers), needed=100)
    assert sentence.startswith(
        "b, validation at step 7: 90% of the units are dormant: over the last 120 samples their "
    )
    assert "Above the limit as well: a." in sentence
    assert "Usual cures: a lower learning rate" in sentence


def test_a_number_over_the_window_is_believed_once_the_window_is_full():
    record = Record(0, layers={"a": layer(0.9, samples=8)})
    assert exceeds(threshold("dormant"), record, needed=100) is None
    # Whether a unit is dead is told by as many samples as it takes.
    assert exceeds(threshold("dead"), record, needed=100).startswith("a, training at step 0: 90% of the units are dead")


@pytest.mark.parametrize(
    "ill",
    [layer(0.5), layer(0.9, is_activation=False), Entry({}, units=3, samples=100)],
    ids=["at the limit", "no activation", "without the number"],
)
def test_nothing_is_said_of(ill):
    assert exceeds(threshold(), Record(0, layers={"a": ill}), needed=100) is None
