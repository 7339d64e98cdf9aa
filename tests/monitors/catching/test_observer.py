import copy
import re
import threading

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.hooks import NoHook
from bnlightning.monitors.catching.observer import MAX_CALLS, Observer
from bnlightning.monitors.counting.layers import LayerAccumulators
from bnlightning.nn.tap import tap

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


def test_a_shared_module_is_chosen_by_any_of_its_paths():
    shared = nn.ReLU()
    net = nn.ModuleDict({"first": shared, "second": shared, "third": nn.ReLU()})
    observer = Observer(["second"], 200)
    observer.attach(net, True, CPU)
    assert observer.watched == ["second"]
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


def test_classes_that_do_not_say_what_they_are_are_named():
    class Squash(nn.Module):
        def forward(self, x):
            return x / (1 + x.abs())

    labels, observer = observed(nn.Sequential(nn.Linear(3, 3), Squash(), nn.ReLU(), Squash()), torch.ones(2, 3))
    assert labels == ["2"]
    report = observer.report(labels)
    assert "so they are not watched: Squash (1, 3). If some activate or normalise" in report and "['1']" in report
    labels, observer = observed(nn.Sequential(Squash()), torch.ones(2, 3), choices=[Squash])
    assert labels == ["0"] and "do not say what they are" not in observer.report(labels)


def test_what_cannot_be_counted_is_told():
    class Sparse(nn.Module):
        def forward(self, x):
            return {"sparse": x.to_sparse(), "dense": x}

    labels, observer = observed(nn.ModuleDict({"a": Sparse()})["a"], torch.eye(3), choices=[Sparse])
    assert (labels, observer.unreadable) == ([], {})
    labels, observer = observed(nn.Sequential(Sparse()), torch.eye(3), choices=[Sparse])
    assert (labels, observer.unreadable) == (["0:dense"], {"0:sparse": "a sparse tensor"})
    assert "These are left out, for they cannot be counted: 0:sparse (a sparse tensor)." in observer.report(labels)


def test_both_parts_of_complex_values_count_in_modules_and_taps():
    class Complex(nn.Module):
        def forward(self, x):
            return tap(torch.complex(x * 0, x), "tap")

    observer, accumulators, network = Observer([Complex], 200), LayerAccumulators(), nn.Sequential(Complex())
    observer.attach(network, False, CPU)
    observer.start(accumulators)
    x = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0]])
    network(x)
    observer.stop()
    module, tapped = accumulators.reduce(CPU).values()
    for found in (module, tapped):
        assert (found.numel, found.minimum, found.maximum) == (12, -1.0, 3.0)
        assert found.units.samples == 2 and found.units.nonzero.tolist() == [2, 0, 2]
    observer.detach()


def test_nested_tensors_count_without_padding():
    class Nested(nn.Module):
        def forward(self, *parts):
            return torch.nested.nested_tensor(list(parts), layout=torch.jagged)

    observer, accumulators, network = Observer([Nested], 200), LayerAccumulators(), nn.Sequential(Nested())
    observer.attach(network, False, CPU)
    observer.start(accumulators)
    network[0](torch.ones(2, 4), torch.zeros(5, 4))
    (found,) = accumulators.reduce(CPU).values()
    assert (found.numel, found.units.samples, found.units.observations) == (28, 2, 7)
    assert found.sum == pytest.approx(8.0)
    # In one sample of two, at two positions of seven.
    assert found.units.fired.tolist() == [1] * 4 and found.units.nonzero.tolist() == [2] * 4
    observer.detach()


def test_names_of_any_characters_are_told_apart_and_shown_as_they_are():
    names = ["a", "a#1", "b", "*b*", "<i>", "layer_1", "_x_", "{", "x$y$", "line\nbreak"]
    net = nn.ModuleDict({name: nn.ReLU() for name in names})
    observer, accumulators = Observer(None, 200), LayerAccumulators()
    observer.attach(net, True, CPU)
    observer.start(accumulators)
    for module in (*net.values(), net["a"]):
        module(torch.ones(2, 3))
    tap(torch.ones(2, 3), "")
    labels = [key.label for key in accumulators.reduce(CPU)]
    assert labels == ["a", "a%231", *names[2:], "a#1", "(no name)"]
    report = observer.report(labels)
    assert ": a (ReLU), a%231 (ReLU), b (ReLU), *b* (ReLU)," in report and "a#1 (ReLU), (no name) (tap)." in report
    assert "Not called" not in report
    observer.detach()
