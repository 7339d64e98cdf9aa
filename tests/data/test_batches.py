import pytest
import torch

from bnlightning.data import TensorBatches
from bnlightning.data.batches import smallest_batch


@pytest.mark.parametrize(("points", "world_size"), [(24, 2), (25, 2), (25, 3), (31, 3)])
def test_ranks_share_every_step_without_repeating_or_dropping_a_point(points, world_size):
    x = torch.arange(points)[:, None]
    ranks = [list(TensorBatches(x, batch_size=4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    single = list(TensorBatches(x, batch_size=4 * world_size))
    assert {len(batches) for batches in ranks} == {len(single)} == {-(-points // (4 * world_size))}
    for step, (together,) in enumerate(single):
        torch.testing.assert_close(torch.cat([batches[step][0] for batches in ranks]), together)


@pytest.mark.parametrize("samples", [24, 25, 31])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ordered_batches_are_shared_among_ranks(samples, world_size):
    x = torch.arange(samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    epochs = []

    def order_of(epoch):
        epochs.append(epoch)
        return order

    def batches(batch_size, **ranks):
        return list(TensorBatches(x, x[:, None], batch_size=batch_size, epoch=lambda: 7, order=order_of, **ranks))

    ranks = [batches(4, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = batches(4 * world_size)
    for step, (together, column) in enumerate(whole):
        torch.testing.assert_close(torch.cat([rank[step][0] for rank in ranks]), together)
        torch.testing.assert_close(torch.cat([rank[step][1] for rank in ranks]), column)
    torch.testing.assert_close(torch.cat([together for together, _ in whole]), order)
    assert set(epochs) == {7}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2, 5, 8, 9, 23, 24, 25])
def test_smallest_batch_is_that_of_some_rank(samples, world_size):
    ranks = [
        TensorBatches(torch.arange(samples), batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    sizes = [len(batch) for batches in ranks for (batch,) in batches]
    assert smallest_batch(samples, 4, world_size) == min(sizes)


def test_batches_can_be_taken_up_amid_an_epoch():
    batches = TensorBatches(torch.arange(10), batch_size=3)
    iterator = iter(batches)
    next(iterator), next(iterator)
    state = batches.state_dict()
    resumed = TensorBatches(torch.arange(10), batch_size=3)
    resumed.load_state_dict(state)
    assert [x.tolist() for (x,) in resumed] == [[6, 7, 8], [9]]
    assert len(list(resumed)) == len(resumed) == 4 and resumed.state_dict() == {"epoch": 0, "served": 0}


def test_an_epochs_state_leaves_another_epoch_alone():
    epochs = [4]
    batches = TensorBatches(torch.arange(10), batch_size=3, epoch=lambda: epochs[-1])
    # As a trainer takes them: it knows their number and does not ask for one more.
    iterator = iter(batches)
    for _ in range(4):
        next(iterator)
    assert batches.state_dict() == {"epoch": 4, "served": 4}
    for epoch, left in ((4, 0), (5, 4)):
        epochs.append(epoch)
        batches.load_state_dict({"epoch": 4, "served": 4})
        assert len(list(batches)) == left and len(list(batches)) == 4


def test_batches_in_the_tensors_own_order_are_views_and_others_are_copies():
    x = torch.arange(6)
    (first, _), (copy, _) = (
        [batch for (batch,) in TensorBatches(x, batch_size=3, order=order)] for order in (None, lambda epoch: x)
    )
    x[0] = 9
    assert first[0] == 9 and copy[0] == 0


@pytest.mark.parametrize(
    ("tensors", "batch_size", "message"),
    [
        ([torch.zeros(4)], 0, "batch_size=0 is not possible: give an integer of at least 1"),
        (
            [torch.zeros(4), torch.zeros(3)],
            2,
            r"tensors have \[4, 3\] samples: give one tensor or more, of equally many",
        ),
        ([], 2, r"tensors have \[\] samples"),
    ],
)
def test_bad_arguments_are_named(tensors, batch_size, message):
    with pytest.raises(ValueError, match=message):
        TensorBatches(*tensors, batch_size=batch_size)
