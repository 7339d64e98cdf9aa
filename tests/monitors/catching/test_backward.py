import gc
import weakref

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.backward import Backwards, leaf_behind


def counted(go_backward, is_of_loss=None):
    """How often the gradient of a hidden value counts."""
    backwards, counts = Backwards(), []
    backwards.is_of_loss = is_of_loss
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3, requires_grad=True)
    hidden = net[1](net[0](x))
    leaf = leaf_behind(hidden)
    hidden.register_hook(lambda grad: counts.append(backwards.counts(leaf)))
    go_backward(net, x, net[2](hidden).sum())
    return counts


def penalty(net, x, y):
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    grad.square().sum().backward()


def hessian_vector(net, x, y):
    weight = net[0].weight
    (grad,) = torch.autograd.grad(y, weight, create_graph=True)
    torch.autograd.grad(grad.square().sum(), weight, retain_graph=True)
    y.backward()


def twice(net, x, y):
    y.backward(retain_graph=True)
    (2 * y).backward()


def double(net, x, y):
    y.backward(create_graph=True)
    x.grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize(
    ("go_backward", "expected"),
    [
        (lambda net, x, y: y.backward(), [True]),
        (penalty, [False, True]),
        (hessian_vector, [False, False, True]),
        (twice, [True, True]),
        (double, [True, True]),
    ],
    ids=["backward", "penalty", "product with the Hessian", "twice", "double backward"],
)
def test_what_adds_to_the_gradients_of_parameters_counts(go_backward, expected):
    assert counted(go_backward) == expected
    assert counted(go_backward, is_of_loss=True) == [True] * len(expected)
    assert counted(go_backward, is_of_loss=False) == [False] * len(expected)


def test_no_hook_keeps_a_graph_alive():
    class Hook:
        def __init__(self, leaf):
            self.leaf = leaf

        def __call__(self, grad):
            pass

    weight = torch.ones(3, requires_grad=True)
    x = (weight * 2).exp().sum()
    hook = Hook(leaf_behind(x))
    assert hook.leaf.variable is weight and leaf_behind(weight) is None
    alive = weakref.ref(hook)
    x.register_hook(hook)
    del x, hook
    gc.collect()
    assert alive() is None
