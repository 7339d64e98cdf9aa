import math
import sys

import numpy as np
import pytest
from torch import nn

from bnlightning._check import (
    by_import_path,
    check_choice,
    check_integer,
    check_number,
    check_share,
    is_function_of_two,
)


@pytest.mark.parametrize("value", [1, 5, np.int64(3)])
def test_integers_within_the_bounds_pass(value):
    check_integer("depth", value, at_least=1, at_most=5)


@pytest.mark.parametrize("value", [0, 6, 2.0, True, None, "3", math.nan])
def test_other_values_are_named_with_the_integers_allowed(value):
    with pytest.raises(ValueError) as raised:
        check_integer("depth", value, at_least=1, at_most=5)
    assert str(raised.value) == f"depth={value!r} is not possible: give an integer from 1 to 5."


@pytest.mark.parametrize("value", [0, 0.5, np.float32(2), 10**9])
def test_numbers_within_the_bounds_pass(value):
    check_number("scale", value, at_least=0.0)


@pytest.mark.parametrize(
    ("value", "bounds", "cure"),
    [
        (0.0, {"above": 0.0}, "give a number above 0."),
        (-1, {"at_least": 0.5}, "give a number of at least 0.5."),
        (math.nan, {}, "give a number."),
        (math.inf, {}, "give a number."),
        (True, {}, "give a number."),
        ("1", {}, "give a number."),
    ],
)
def test_other_values_are_named_with_the_numbers_allowed(value, bounds, cure):
    with pytest.raises(ValueError) as raised:
        check_number("scale", value, **bounds)
    assert str(raised.value) == f"scale={value!r} is not possible: {cure}"


@pytest.mark.parametrize("value", [0, 0.0, 0.999])
def test_shares_that_can_be_exceeded_pass(value):
    check_share("limit", value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, math.nan, True, "0.5", None])
def test_other_shares_are_named(value):
    with pytest.raises(ValueError) as raised:
        check_share("limit", value)
    assert str(raised.value) == f"limit={value!r} is not possible: give a share from 0 to below 1, such as 0.5."


def test_one_of_the_choices_passes():
    check_choice("norm", "torch", {"custom": 1, "torch": 2})


@pytest.mark.parametrize("value", ["Torch", None, 1, ["torch"], {"torch": 2}])
def test_others_are_named_with_the_choices(value):
    with pytest.raises(ValueError) as raised:
        check_choice("norm", value, {"custom": 1, "torch": 2})
    assert str(raised.value) == f"norm={value!r} is not known: choose one of custom, torch."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch.nn.ReLU", nn.ReLU),
        ("torch.nn.functional.relu", nn.functional.relu),
        ("net.*", "net.*"),
        ("torch.nn.NoSuchThing", "torch.nn.NoSuchThing"),
        ("torch.nn", "torch.nn"),
        ("relu", "relu"),
        ("", ""),
        (nn.ReLU, nn.ReLU),
        (None, None),
    ],
)
def test_an_import_path_is_what_it_leads_to(value, expected):
    assert by_import_path(value) is expected or by_import_path(value) == expected


def test_nothing_is_imported_for_a_word_that_may_be_a_pattern():
    assert by_import_path("this.Zen") == "this.Zen" and "this" not in sys.modules


def test_what_is_not_wanted_stays_a_word():
    assert by_import_path("torch.nn.ReLU", is_function_of_two) == "torch.nn.ReLU"
    assert not is_function_of_two(lambda x: x) and not is_function_of_two(3)
