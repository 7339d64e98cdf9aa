import pytest

from bnlightning.diagnosis.nonfinite import cures_nonfinite, where_nonfinite


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("input", "the batch of step 3 holds a NaN or an infinity"),
        ("loss", "at step 3 the loss is the first NaN or infinity, and no module put one out before"),
        ("net.1", "at step 3 the first NaN or infinity is in the output of net.1"),
        ("before net.1", "at step 3 the first NaN or infinity is in the input of net.1, made by an operation that is"),
        ("after net.1", "at step 3 the first NaN or infinity is in the loss, made by an operation behind net.1"),
    ],
)
def test_where_it_was(place, sentence):
    assert where_nonfinite(place, 3).startswith(sentence)


def test_a_module_is_named_with_its_class_whatever_its_name_is():
    assert where_nonfinite("before net.a b", 3, {"net.a b": "Linear"}.get).startswith(
        "at step 3 the first NaN or infinity is in the input of net.a b (Linear), made"
    )


def test_a_bad_batch_has_cures_of_its_own():
    assert "clean the data" in cures_nonfinite("input")
    assert cures_nonfinite("net.1") == cures_nonfinite("loss") != cures_nonfinite("input")
