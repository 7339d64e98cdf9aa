import pytest

from bnlightning.diagnosis.nonfinite import cures_nonfinite, where_nonfinite
from bnlightning.monitors.catching.finite_check import Place


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (Place("batch"), "the batch of step 3 holds a NaN or an infinity"),
        (Place("batch", ":1.x", 5), "the batch of step 3 (batch_idx=5) holds a NaN or an infinity in its entry 1.x"),
        (Place("loss"), "at step 3 the loss is the first NaN or infinity, and no module put"),
        (Place("output", "net.my act"), "at step 3 the first NaN or infinity is in the output of net.my act"),
        (
            Place("before", "net.1"),
            "at step 3 the first NaN or infinity is in the input of net.1, made by an operation",
        ),
        (
            Place("first", "net.0"),
            "at step 3 the first NaN or infinity is in the input of net.0, made in training_step",
        ),
        (
            Place("after", "net.1"),
            "at step 3 the first NaN or infinity is in the loss, made by an operation behind net",
        ),
        (Place("parameter", "a.b"), "at step 3 the first NaN or infinity is in the parameter a.b, since the update of"),
        (Place("buffer", "a.var"), "at step 3 the first NaN or infinity is in the buffer a.var, since the update of"),
    ],
)
def test_where_it_was(place, sentence):
    assert where_nonfinite(place, 3).startswith(sentence)


def test_a_parameter_may_be_bad_from_the_start():
    assert "since" not in where_nonfinite(Place("parameter", "a.b"), 0)


def test_each_origin_has_cures_of_its_own():
    assert "clean the data" in cures_nonfinite(Place("batch"))
    assert "gradient that is not finite" in cures_nonfinite(Place("parameter", "a"))
    cures = {cures_nonfinite(Place(kind)) for kind in ("batch", "parameter", "first", "output")}
    assert len(cures) == 4 and cures_nonfinite(Place("loss")) in cures


def test_a_module_is_named_with_its_class_whatever_its_name_is():
    assert where_nonfinite(Place("before", "net.a b"), 3, {"net.a b": "Linear"}.get).startswith(
        "at step 3 the first NaN or infinity is in the input of net.a b (Linear), made"
    )
