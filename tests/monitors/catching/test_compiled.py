import torch
from torch import nn

from bnlightning.monitors.catching.compiled import (
    add_receiver,
    is_compiled,
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
