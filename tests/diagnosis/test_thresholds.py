import pytest

from bnlightning.diagnosis.thresholds import ill_layers, make_thresholds, sentence
from bnlightning.monitors.counting.layer_statistics import layer_statistics
from bnlightning.monitors.counting.norm_statistics import norm_catalogue
from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.record import Entry, Record


def layer(share, samples=100, is_activation=True):
    numbers = {"dead": share, "dormant": share}
    return Entry(numbers, units=10, samples=samples, is_activation=is_activation, module="ReLU")


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
    ill = ill_layers(threshold("dormant"), Record(7, "val", layers=layers), needed=100)
    assert list(ill) == ["b (ReLU)", "a (ReLU)"]
    said = sentence(threshold("dormant"), ill)
    assert said.startswith(
        "in b (ReLU), 90% of the units are dormant: over the last 120 samples their mean magnitude is at most "
        "tau times the layer's (validation, step 7). "
    )
    assert "Above the limit as well: a (ReLU)." in said
    assert "Usual cures: a lower learning rate" in said


def test_a_share_of_one_step_waits_for_no_window():
    (saturated,) = make_thresholds({"saturated": 0.5}, layer_statistics())
    few = Entry({"saturated": 0.9, "dormant": 0.9}, units=10, samples=1, is_activation=True, module="Tanh")
    record = Record(0, layers={"a": few})
    assert list(ill_layers(saturated, record, needed=100)) == ["a (Tanh)"]
    assert ill_layers(threshold("dormant"), record, needed=100) == {}


@pytest.mark.parametrize("braces", ["{i}", "{", "{0}", "%s", "$x$"])
def test_a_name_with_braces_stays_as_it_is(braces):
    ill = ill_layers(threshold(), Record(0, layers={braces: layer(0.9)}), needed=100)
    assert sentence(threshold(), ill).startswith(f"in {braces} (ReLU), 90% of")


def gradients(norms):
    entries = {
        name: Entry({"grad_norm": norm}, is_weight="bias" not in name, module="Linear") for name, norm in norms.items()
    }
    (found,) = make_thresholds({"grad_norm": 1000.0}, parameter_catalogue().statistics, "param")
    assert found.argument == "warn_grad_norm_ratio_above"
    return ill_layers(found, Record(5, parameters=entries))


def test_gradients_are_held_against_the_last_weights():
    assert gradients({"a.weight": 0.01, "a.bias": 1e-9, "b.weight": 1.0, "b.bias": 1e-12}) == {}
    assert gradients({"a.weight": 1e-6, "b.weight": 2e-5, "c.weight": 0.1}) == {
        "a.weight (Linear)": "the norm of the gradient is 1e+05 times smaller than that of the last layer "
        "(training, step 5).",
        "b.weight (Linear)": "the norm of the gradient is 5e+03 times smaller than that of the last layer "
        "(training, step 5).",
    }
    ((what),) = gradients({"a.weight": 1e6, "c.weight": 0.1}).values()
    assert "is 1e+07 times larger than" in what
    ((what),) = gradients({"a.weight": 0.0, "c.weight": 0.1}).values()
    assert what == "the gradient is zero, so that the layer learns nothing (training, step 5)."
    assert len(gradients({"a.weight": 0.0, "c.weight": 0.0})) == 2


def test_dead_units_wait_for_no_window():
    """They have been told by as many samples as it takes."""
    record = Record(0, layers={"a": layer(0.9, samples=8)})
    assert ill_layers(threshold("dormant"), record, needed=100) == {}
    assert list(ill_layers(threshold("dead"), record, needed=100)) == ["a (ReLU)"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mean_drift", 3.25, "the running mean is 3.25 running standard deviations away from the batch mean"),
        ("var_drift", 2.0, "the logarithm of the running over the batch variance is 2 in magnitude"),
        ("nonfinite", 0.5, "50% of the channels have a NaN or an infinity"),
    ],
)
def test_batch_norm_layers(name, value, words):
    (found,) = make_thresholds({name: 0.4}, norm_catalogue().statistics, "norm")
    ill = ill_layers(found, Record(5, norms={"bn": Entry({name: value}, module="BatchNorm1d")}))
    assert sentence(found, ill).startswith(f"in bn (BatchNorm1d), {words}")


@pytest.mark.parametrize(
    "well",
    [layer(0.5), layer(0.9, is_activation=False), Entry({}, units=3, samples=100)],
    ids=["at the limit", "no activation", "without the number"],
)
def test_nothing_is_said_of(well):
    assert ill_layers(threshold(), Record(0, layers={"a": well}), needed=100) == {}
