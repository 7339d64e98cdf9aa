import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnlightning.monitors.catching.hooks import NoHook, is_recomputation


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
