import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.hooks import NoHook
from bnlightning.monitors.catching.observer import MAX_CALLS, Observer, tensors_in
from bnlightning.monitors.counting.layers import LayerAccumulators

CPU = torch.device("cpu")


def observed(module, *inputs, choices=None, max_layers=200):
    """The labels of what is seen in one batch, and the observer."""
    observer, accumulators = Observer(choices, max_layers), LayerAccumulators()
    observer.attach(module, False, CPU)
    observer.start(accumulators)
    for x in inputs:
        module(x)
    observer.stop()
    labels = [key.label for key in accumulators.reduce(CPU)]
    return labels, observer


def test_calls_of_one_module_are_told_apart_up_to_a_maximum():
    relu = nn.Sequential(nn.ReLU())
    labels, observer = observed(relu, *[torch.ones(2, 3)] * (MAX_CALLS + 3))
    assert labels == ["0", *(f"0#{number}" for number in range(1, MAX_CALLS))]
    observer.start(LayerAccumulators())
    # The next batch begins with the first call.
    relu(torch.ones(2, 3))
    assert observer.seen == labels


def test_layers_beyond_the_maximum_are_left_out_and_told():
    labels, observer = observed(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ELU()), torch.ones(2, 3), max_layers=2)
    assert labels == ["0", "1"] and list(observer.left_out) == ["2"]


def test_the_report_says_what_is_watched_and_what_is_not():
    class Odd(nn.Module):
        def forward(self, x):
            return "no tensor"

    module = nn.ModuleDict({"act": nn.ReLU(), "odd": Odd(), "unused": nn.Tanh()})
    observer = Observer(["act", "odd", "unused"], 200)
    observer.attach(module, False, CPU)
    observer.start(LayerAccumulators())
    module["act"](torch.ones(2, 3))
    module["odd"](torch.ones(2, 3))
    report = observer.report(observer.seen)
    assert report == (
        "1 layer is watched: act (ReLU). These were not called so far: unused. "
        "These put out no floating tensor: odd (str)."
    )
    observer.detach()
    assert not any(part._forward_hooks for part in module.modules())


def test_hooks_of_a_copy_do_nothing():
    module = nn.Sequential(nn.ReLU())
    observer = Observer(None, 200)
    observer.attach(module, False, CPU)
    (hook,) = copy.deepcopy(module)[0]._forward_hooks.values()
    assert isinstance(hook, NoHook)
    observer.detach()


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


Pair = namedtuple("Pair", ["first", "second"])
X = torch.ones(2)


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        (X, [""]),
        ((X, [X, "text"]), [":0", ":1.0"]),
        ({"a": X, "b": None}, [":a"]),
        (Output(X, (X, X)), [":logits", ":hidden.0", ":hidden.1"]),
        (Pair(X, X.long()), [":0"]),
        ([[[[[X]]]]], []),
        (X.to_sparse(), []),
        (torch.ones(2, device="meta"), []),
        ("text", []),
    ],
    ids=["tensor", "nested", "mapping", "dataclass", "named tuple", "too deep", "sparse", "meta", "text"],
)
def test_tensors_in_what_a_module_returned(output, paths):
    assert [path for path, _ in tensors_in(output)] == paths
