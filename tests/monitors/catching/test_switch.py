import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.switch import Switch


def hooks_of(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_pre_hooks_with_kwargs)


def switched(module):
    calls, switch = [], Switch(module)
    switch.add(module, lambda *_: calls.append("behind"))
    switch.add_before(module, lambda *_: calls.append("before"))
    return calls, switch


def test_hooks_are_on_only_in_batches_with_something_to_see():
    module = nn.Linear(1, 1)
    calls, switch = switched(module)
    for is_looking in (True, False, True):
        assert hooks_of(module) == 0
        switch.begin(is_looking)
        module(torch.ones(1))
        assert hooks_of(module) == (3 if is_looking else 0)
        switch.end()
        module(torch.ones(1))
    assert calls == ["before", "behind"] * 2
    switch.begin(True)
    switch.remove()
    assert hooks_of(module) == 0


@pytest.fixture
def compiled():
    torch.compiler.reset()
    module = nn.Sequential(nn.Linear(1, 1))
    module.compile(backend="eager")
    yield module
    torch.compiler.reset()


def test_in_a_compiled_network_they_are_on_in_every_batch(compiled):
    # Compiled before there are hooks, and once more before the first batch.
    compiled(torch.ones(1))
    _, switch = switched(compiled[0])
    assert not switch.is_compiled
    calls, switch = switched(compiled)
    compiled(torch.ones(1))
    for is_looking in (False, True):
        switch.begin(is_looking)
        assert hooks_of(compiled) == 3
        compiled(torch.ones(1))
        switch.end()
        assert hooks_of(compiled) == 0
    assert calls == ["before", "behind"] * 2
    # A graph that is made between two batches does not know the hooks, and is made anew, but only once.
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1))
    switch.begin(False)
    switch.end()
    assert hooks_of(compiled) == 3
    switch.remove()


def test_a_function_that_turns_out_to_be_compiled(compiled):
    module = nn.Linear(1, 1)
    calls, switch = switched(module)
    step = torch.compile(lambda x: module(x), backend="eager")
    switch.begin(False)
    step(torch.ones(1))
    switch.end()
    assert switch.is_compiled and calls == []
    switch.begin(False)
    step(torch.ones(1))
    assert calls == ["before", "behind"]
    switch.remove()
