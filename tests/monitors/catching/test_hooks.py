import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bnlightning.monitors.catching.hooks import (
    NoHook,
    apart,
    is_batched,
    is_recomputation,
    is_recorded,
    is_transformed,
    is_usual,
)

# Torch's own, also of what derivatives are made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


def test_a_recomputed_forward_pass_is_told_from_a_first_one():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(is_recomputation())
            return super().forward(x)

    x = torch.ones(2, 3, requires_grad=True)
    for use_reentrant in (False, True):
        seen.clear()
        checkpoint(Watched(3, 3), x, use_reentrant=use_reentrant).sum().backward()
        assert seen == [False, True]


def test_the_hook_of_a_copy_does_nothing():
    assert NoHook()(nn.Linear(1, 1), (), None) is None


def doubled_in_a_transform(x):
    assert torch.compiler.is_compiling() or is_usual() != is_transformed()
    return (x * 2 if is_transformed() else x).sum()


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (doubled_in_a_transform, 3),
        (lambda x: torch.func.vmap(doubled_in_a_transform)(x[None]).sum(), 6),
        (lambda x: torch.func.grad(doubled_in_a_transform)(x).sum(), 6),
    ],
    ids=["plain", "vmap", "grad"],
)
def test_transforms_are_told_also_inside_of_compiled_graphs(function, expected, backend):
    torch.compiler.reset()
    call = function if backend is None else torch.compile(function, backend=backend, fullgraph=True)
    assert int(call(torch.ones(3))) == expected
    torch.compiler.reset()


def test_gradients_that_stand_for_a_batch_are_told():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append((is_batched(grad), is_transformed())))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [(True, False), (False, False)]


def test_a_recording_is_told_from_a_computation():
    seen = []

    def f(x):
        seen.append(is_recorded())
        assert not (seen[-1] and is_usual())
        return x + 1

    f(torch.ones(2))
    assert is_usual()
    with Counting():
        f(torch.ones(2))
    assert seen == [False, False]
    torch.jit.trace(f, torch.ones(2), check_trace=False)
    for options in ({}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}):
        make_fx(f, **options)(torch.ones(2))
    with torch._subclasses.FakeTensorMode():
        f(torch.ones(2))
    assert seen == [False, False] + [True] * 6


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Counting.count += 1
        return function(*args, **kwargs or {})


class CountingFunctions(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        CountingFunctions.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [Counting, CountingFunctions])
def test_modes_of_the_user_do_not_see_what_is_computed_apart(mode):
    mode.count = 0
    with mode():
        assert not is_usual()
        with apart():
            torch.ones(2).add(1)
        assert mode.count == 0
        torch.ones(2).add(1)
        assert mode.count == 2
