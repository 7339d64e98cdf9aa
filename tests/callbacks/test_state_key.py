import subprocess
import sys
from functools import partial

import pytest
from torch import nn

from bnlightning.callbacks._state_key import described


class Rule:
    def __init__(self, name):
        self.name = name

    def __call__(self, path, module):
        return path == self.name

    def method(self, path, module):
        return path == self.name


def by_name(path, module, name="net"):
    return path == name


def made(name):
    return lambda path, module: path.startswith(name)


def recursive():
    def rule(path, module):
        return rule is not None

    return rule


@pytest.mark.parametrize(
    "values",
    [
        (made("a"), made("b")),
        (lambda path, module: path == "a", lambda path, module: path == "b"),
        (partial(by_name, name="a"), partial(by_name, name="b")),
        (Rule("a"), Rule("b")),
        (Rule("a").method, Rule("b").method),
        (nn.ReLU, nn.Tanh),
        ("net.*", ["net.*", "head"]),
        (by_name, Rule("a")),
        ({"eps": 1e-5}, {"eps": 1e-3}),
    ],
)
def test_values_that_differ_are_told_apart(values):
    one, other = map(described, values)
    assert one != other
    for each in (one, other):
        # No address.
        assert " at 0x" not in repr(each)


@pytest.mark.parametrize("make", [lambda: made("a"), recursive, lambda: partial(by_name, name="a"), lambda: {"b", "a"}])
def test_the_same_value_made_twice_is_the_same(make):
    assert described(make()) == described(make())


def test_it_is_the_same_in_another_process():
    code = (
        "from bnlightning.callbacks._state_key import described\n"
        "print(described([lambda path, module: path in {'a', 'b', 'c'}, {'x', 'y', 'z'}]))"
    )
    told = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3)}
    assert len(told) == 1
