import pytest
import torch
from helpers import run_on_ranks

from bnlightning.monitors.counting.ranks import all_keys

CPU = torch.device("cpu")
MANY = [("layer", number) for number in range(100)]
OWN = {
    "the same": [MANY] * 3,
    "in another order": [MANY, MANY[::-1], MANY],
    "some are missing": [MANY[10:], MANY[:50], MANY],
    "one has more": [MANY, [*MANY[:3], ("late", 1), *MANY[3:]], MANY],
    "the first has none": [[], [("b", 0), ("a", 0)], [("a", 0), ("c", 0)]],
}


def keys_on_rank(rank):
    gathered = []
    real = torch.distributed.all_gather_object

    def counted(found, own):
        gathered.append(len(own))
        real(found, own)

    torch.distributed.all_gather_object = counted
    found = {}
    for name, own in OWN.items():
        gathered.clear()
        found[name] = all_keys(own[rank], CPU), gathered.copy()
    return found


@pytest.mark.slow
def test_keys_of_all_ranks_and_how_many_each_sends(tmp_path):
    for rank, found in enumerate(run_on_ranks(keys_on_rank, 3, tmp_path)):
        for name, own in OWN.items():
            keys, gathered = found[name]
            # As if all keys of all ranks were put one after another.
            assert keys == list(dict.fromkeys(key for keys in own for key in keys)), name
            # What rank 0 has, nobody else sends: a layer that is missing somewhere costs nothing.
            assert gathered == ([] if name == "the same" else [len(set(own[rank]) - set(own[0]))]), name
