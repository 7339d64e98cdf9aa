import numpy as np
import torch

from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey
from bnlightning.monitors.counting.units import RecentUnits

CPU = torch.device("cpu")


def test_recent_units_are_those_of_the_last_samples():
    recent, key = RecentUnits(samples=10), LayerKey("layer", True, 3)
    firing = [torch.eye(3)[[0, 0, 0, 0]], torch.eye(3)[[1] * 6], torch.eye(3)[[2] * 12], torch.eye(3)[[2] * 12]]
    seen = []
    for x in firing:
        window = LayerAccumulators()
        window.update(key, x)
        units = recent.add(key, window.reduce(CPU)[key].units)
        seen.append((units.samples, (units.nonzero > 0).tolist()))
    # The first two make a generation of just 10 samples, which the third follows; the fourth comes after both.
    assert seen == [
        (4, [True, False, False]),
        (10, [True, True, False]),
        (22, [True, True, True]),
        (24, [False, False, True]),
    ]
    again = RecentUnits(samples=10)
    again.load_state_dict(recent.state_dict())
    window = LayerAccumulators()
    window.update(key, firing[0])
    units = window.reduce(CPU)[key].units
    for mine, theirs in zip(vars(recent.add(key, units)).values(), vars(again.add(key, units)).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
