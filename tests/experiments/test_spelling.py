from collections.abc import Sequence
from typing import Literal

import pytest

from bnlightning.experiments.spelling import is_known, keys_of, may_be_added, near, what_fits


class Part:
    def __init__(
        self, size: int, rate: float = 0.1, sizes: int | Sequence[int] = 3, mode: Literal["a", "b"] = "a", free=1
    ):
        pass


class Anything:
    def __init__(self, **options):
        pass


CONTENTS = {
    "seed": 1,
    "part": {"_target_": f"{__name__}.Part", "size": 3, "free": 2},
    "any": {"_target_": f"{__name__}.Anything"},
    "gone": {"_target_": "nobody.knows"},
    "options": {"eps": 0.1, "momentum": 0.5},
    "refers": "${note}/here",
    "many": [1, 2],
    "later": "${part}",
}


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("norm", ["model.norm"]),
        ("NORM", ["model.norm"]),
        ("model.nrom", ["model.norm"]),
        ("data.max_steps", ["trainer.max_steps"]),
        ("experimnt", ["experiment"]),
        ("lr", ["model.learning_rate"]),
        ("every", []),
        ("e", []),
    ],
)
def test_the_nearest_keys_are_found(word, found):
    known = ["experiment", "model.norm", "model.learning_rate", "trainer.max_steps", "data.e_x"]
    assert near(word, known) == found


def test_a_key_is_known_where_it_is_or_may_be():
    assert all(is_known(key, CONTENTS) for key in ("seed", "part.size", "many.0", "later.size", "options"))
    assert not any(is_known(key, CONTENTS) for key in ("sed", "part.rate", "seed.x", "options.affine"))


def test_what_means_something_may_be_added():
    for key in ("part.rate", "part._convert_", "gone.x", "any._partial_"):
        assert may_be_added(key, CONTENTS, asked=False), key
    for key in ("options.affine", "any.x", "note"):
        assert may_be_added(key, CONTENTS, asked=True) and not may_be_added(key, CONTENTS, asked=False), key
    for key in ("part.rat", "options.epss", "other", "seed.x", "no"):
        assert not may_be_added(key, CONTENTS, asked=True), key
    assert {"part.size", "part.rate", "options.eps"} <= set(keys_of(CONTENTS))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("part.size", "many", "an integer"),
        ("part.size", True, "an integer"),
        ("part.size", [1, 2], "an integer"),
        ("part.rate", "fast", "a number"),
        ("part.mode", "c", "a or b"),
        ("options.eps", [1, 2], "one value"),
        ("seed", {"a": 1}, "one value"),
        ("part.size", 3, ""),
        ("part.size", "${seed}", ""),
        ("part.rate", 3, ""),
        ("part.sizes", [1, 2], ""),
        ("part.free", [1, 2], ""),
        ("part.mode", "b", ""),
        ("gone.x", [1], ""),
        ("many", [1], ""),
    ],
)
def test_a_value_fits_or_it_is_said_what_would(key, value, wanted):
    assert what_fits(key, CONTENTS, value) == wanted
