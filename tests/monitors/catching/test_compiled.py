import torch
from torch import nn

from bnlightning.monitors.catching.compiled import (
    add_receiver,
    copied,
    has_compiled,
    is_compiled,
    make_one,
    number_of_compilations,
    observe,
    observe_tap,
    remove_receiver,
)


def test_values_reach_the_receiver_of_their_number_only():
    seen, taps = [], []
    numbers = [
        add_receiver(lambda *args, which=which: seen.append((which, *args)), lambda *args: taps.append(args))
        for which in (0, 1)
    ]
    x, index = torch.ones(3), torch.tensor(7)
    observe(x, numbers[1], index, 2)
    observe_tap(x, numbers[0], "name", -1.0, float("inf"))
    observe_tap(x, numbers[0], "name", -float("inf"), float("inf"))
    remove_receiver(numbers[1])
    observe(x, numbers[1], index, 2)
    assert [(which, int(index), position) for which, index, position, _ in seen] == [(1, 7, 2)]
    assert [limits for _, _, limits in taps] == [(-1.0, float("inf")), None]
    remove_receiver(numbers[0])


def test_a_compiled_part_makes_a_module_compiled():
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not is_compiled(plain)
    assert is_compiled(nn.Sequential(plain, torch.compile(nn.Linear(2, 2))))
    plain[0].compile()
    assert is_compiled(plain)


class Method(nn.Module):
    @torch.compile(backend="eager")
    def forward(self, x):
        return x + 1


class Disabled(nn.Module):
    @torch.compiler.disable
    def forward(self, x):
        return x + 1


def test_a_compiled_method_makes_a_module_compiled():
    plain = nn.Sequential(nn.Linear(2, 2))
    assert is_compiled(nn.Sequential(plain, Method())) and not is_compiled(Disabled())
    plain.step = torch.compile(plain.forward, backend="eager")
    assert is_compiled(plain)


def test_what_is_compiled_counts():
    torch.compiler.reset()
    before = number_of_compilations()
    assert not has_compiled()
    Method()(torch.ones(2))
    assert has_compiled() and number_of_compilations() == before + 1
    torch.compiler.reset()
    assert not has_compiled() and number_of_compilations() == before + 1


def test_a_copy_is_exact():
    x = torch.tensor([1.0, -0.0, float("nan"), -float("inf"), 1e-40])
    one = make_one(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = copied(x.to(dtype), one)
        assert values.dtype is (dtype if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(values, x.to(dtype).to(values.dtype), rtol=0, atol=0, equal_nan=True)
