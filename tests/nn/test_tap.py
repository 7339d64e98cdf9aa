import pytest
import torch

from bnlightning import tap
from bnlightning.nn.tap import add_listener, remove_listener


def test_listeners_are_called_until_they_are_removed():
    heard = []

    def listener(name, x, limits):
        heard.append((name, x, limits))

    x = torch.randn(3, requires_grad=True)
    add_listener(listener)
    try:
        assert tap(x, "first") is x
        assert tap(x, "second", (0.0, 1.0)) is x
    finally:
        remove_listener(listener)
        remove_listener(listener)
    assert tap(x, "third") is x
    assert [(name, limits) for name, _, limits in heard] == [("first", None), ("second", (0.0, 1.0))]
    assert all(value is x for _, value, _ in heard)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([torch.zeros(2)], "states"),
            r"x of tap\(x, 'states'\) is a list: give a tensor, and each tensor its own name",
        ),
        ((torch.zeros(2), "gate", (0.5,)), r"limits=\(0.5,\) of tap\(x, 'gate'\) is not possible: give a pair"),
        ((torch.zeros(2), "gate", 0.99), r"limits=0.99 of tap\(x, 'gate'\) is not possible: give a pair"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tap(*arguments)


def test_a_graph_that_fx_traces_goes_past_it():
    traced = torch.fx.symbolic_trace(lambda x: tap(torch.relu(x), "relu") + 1)
    assert torch.equal(traced(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))
