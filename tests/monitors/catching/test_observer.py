import copy
import re
import threading
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.hooks import NoHook
from bnlightning.monitors.catching.observer import MAX_CALLS, Observer, tensors_in
from bnlightning.monitors.counting.layers import LayerAccumulators

# Torch's own, also of what derivatives are made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]

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
    observer.start(LayerAccumulators())
    (hook,) = copy.deepcopy(module)[0]._forward_hooks.values()
    assert isinstance(hook, NoHook)
    # Between batches a network has no hooks that could be copied or scripted.
    observer.stop()
    assert not module[0]._forward_hooks
    assert copy.deepcopy(observer).modules == []
    observer.detach()


def sampled(module, run, **options):
    """The means of what is seen while ``run`` calls ``module`` in any way, and the observer."""
    observer, accumulators = Observer(None, 200), LayerAccumulators()
    observer.attach(module, False, CPU)
    observer.grad_scale = options.get("grad_scale")
    observer.start(accumulators)
    run(module)
    observer.stop()
    means = {}
    for key, sums in accumulators.reduce(CPU).items():
        means[key.label + (" gradient" if key.is_gradient else "")] = sums.sum / sums.numel
    return means, observer


TANH = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
TWO = torch.ones(2, 4)
EXPECTED = {"1": pytest.approx(TANH(TWO).mean().item())}


@pytest.mark.parametrize(
    "transform",
    [
        lambda net: torch.func.vmap(net)(TWO),
        lambda net: torch.func.vmap(torch.func.grad(lambda x: net(x).sum()))(TWO),
        lambda net: torch.func.jvp(net, (TWO,), (TWO,)),
        lambda net: torch.func.hessian(lambda x: net(x).sum())(TWO),
        lambda net: torch.func.grad(lambda p: torch.func.functional_call(net, p, (TWO,)).sum())(
            dict(net.named_parameters())
        ),
    ],
    ids=["vmap", "vmap of grad", "jvp", "hessian", "grad by parameters"],
)
def test_calls_inside_a_transform_are_left_out_and_told(transform):
    means, observer = sampled(TANH, lambda net: (transform(net), net(TWO)))
    assert means == EXPECTED and observer.transformed == "0"


@pytest.mark.parametrize(
    "record",
    [
        lambda net: torch.jit.trace(net, TWO, check_trace=False),
        lambda net: torch.fx.experimental.proxy_tensor.make_fx(net)(TWO),
        lambda net: torch.export.export(net, (TWO,)),
        lambda net: copy.deepcopy(net)(TWO),
    ],
    ids=["trace", "make_fx", "export", "copy"],
)
def test_a_recorded_program_is_that_of_the_network_alone_and_not_counted(record):
    def operators(program):
        return re.sub(r"___torch_mangle_\d+\.| #.*", "", str(getattr(program, "graph", "")))

    programs = []
    means, _ = sampled(TANH, lambda net: (programs.append(record(net)), net(TWO)))
    assert means == EXPECTED and operators(programs[0]) == operators(record(TANH))


def test_vectorised_gradients_are_left_out():
    def run(net):
        x = TWO.clone().requires_grad_()
        y = net(x).sum(1)
        torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
        y.sum().backward()

    means, _ = sampled(TANH, run, grad_scale=1.0)
    assert means == EXPECTED | {"1 gradient": 1.0}


def test_modes_of_the_user_see_the_network_alone():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as alone:
        TANH(TWO)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        means, _ = sampled(TANH, lambda net: net(TWO))
    assert means == EXPECTED and counter.get_flop_counts() == alone.get_flop_counts()


def test_workers_of_one_step_add_up_and_number_their_calls_alone():
    def run(net):
        for _ in range(2):
            workers = [threading.Thread(target=lambda x=x: net(x)) for x in (TWO, TWO)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

    means, observer = sampled(TANH, run)
    assert means == EXPECTED and observer.seen == ["1"]


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
