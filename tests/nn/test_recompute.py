import copy

import numpy as np
import pytest
import torch
from helpers import run_on_ranks
from torch import nn

from bnlightning import BatchNorm1d, BatchNorm2d
from bnlightning.nn import accumulate_statistics, recompute_statistics


def batches(*sizes, shift=0.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator) * (1 + k) + k + shift for k, size in enumerate(sizes)]


def statistics(data, ddof):
    together = torch.cat(data).double().numpy()
    return together.mean(axis=0), together.var(axis=0, ddof=ddof)


@pytest.mark.parametrize(
    ("layer", "ddof"),
    [
        (nn.BatchNorm1d(3), 1),
        (BatchNorm1d(3), 1),
        (BatchNorm1d(3, convention="keras"), 0),
        (BatchNorm1d(3, convention="caffe"), 1),
        (BatchNorm1d(3, convention="from_scratch"), 0),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_they_are_the_mean_and_variance_of_all_values(layer, ddof, shift):
    layer = copy.deepcopy(layer).eval()
    data = batches(4, 2, 7, shift=shift)
    assert recompute_statistics(layer, data) == 3
    mean, var = statistics(data, ddof)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-6)
    assert layer.num_batches_tracked == 3 and not layer.training


def test_deeper_layers_see_what_earlier_ones_give_in_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))
    data = batches(16, 16)
    hidden = [net[0](x) for x in data]
    seen = [net[4](torch.relu((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt())) for h in hidden]
    parameters = copy.deepcopy(list(net.parameters()))
    # In evaluation mode: without dropout, and yet by each batch's statistics.
    recompute_statistics(net.eval(), data)
    torch.testing.assert_close(net[5].running_mean, torch.cat(seen).mean(0))
    torch.testing.assert_close(net[5].running_var, torch.cat(seen).var(0))
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), parameters, strict=True))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_layer_called_twice_and_one_never_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = BatchNorm1d(3), BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x) + 5)

    net, (x,) = Net(), batches(8)
    recompute_statistics(net, [x])
    first = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    both = torch.cat([x, first + 5])
    torch.testing.assert_close(net.norm.running_mean, both.mean(0))
    torch.testing.assert_close(net.norm.running_var, both.var(0))
    assert net.unused.num_batches_tracked == 0 and net.unused.running_mean.count_nonzero() == 0


def test_what_is_a_batch():
    data = batches(4, 6)
    mean, _ = statistics(data, 0)
    for batches_, options in [
        ([(x, "target") for x in data], {}),
        ([[x] for x in data], {}),
        ([{"input": x, "scale": 1.0} for x in data], {}),
    ]:
        net = nn.ModuleList([BatchNorm1d(3)])
        net.forward = lambda input, scale=1.0, net=net: net[0](input * scale)
        recompute_statistics(net, batches_, **options)
        np.testing.assert_allclose(net[0].running_mean.numpy(), mean, rtol=1e-6)
    layer = BatchNorm1d(3)
    recompute_statistics(layer, [{"input": x} for x in data])
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6)
    layer = BatchNorm1d(3)
    recompute_statistics(layer, [("a", x) for x in data], forward=lambda batch: layer(batch[1]))
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6)


def test_steps_limit_the_batches_taken():
    taken = []

    def endless():
        while True:
            taken.append(torch.randn(4, 3))
            yield taken[-1]

    layer = BatchNorm1d(3)
    assert recompute_statistics(layer, endless(), steps=5) == 5 == len(taken)
    np.testing.assert_allclose(layer.running_mean.numpy(), statistics(taken, 0)[0], rtol=1e-6)


def test_per_activation():
    layer = BatchNorm2d(6, convention="from_scratch")
    x = torch.randn(5, 3, 2, 1)
    recompute_statistics(layer, [x[:2], x[2:]])
    torch.testing.assert_close(layer.running_var, x.flatten(1).var(0, correction=0))


def test_an_exception_leaves_the_model_as_it_was():
    def data():
        yield torch.randn(4, 3)
        raise RuntimeError("the disk is full")

    net = nn.Sequential(BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    before, buffers = copy.deepcopy(net.state_dict()), [id(b) for b in net.buffers()]
    with pytest.raises(RuntimeError, match="the disk is full"):
        recompute_statistics(net, data())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [id(b) for b in net.buffers()] == buffers and not any(m._forward_pre_hooks for m in net.modules())
    assert all(layer.track_running_stats and not layer.training for layer in net)


@pytest.mark.parametrize(
    ("module", "data", "options", "message"),
    [
        (nn.Linear(3, 3), [torch.ones(2, 3)], {}, "module=Linear has no batch norm layer that keeps running"),
        (BatchNorm1d(3), [], {}, "data=list gave no batch"),
        (BatchNorm1d(3), torch.ones(2, 3), {}, r"data=Tensor of shape \(2, 3\) is not possible: give batches"),
        (BatchNorm1d(3), [torch.ones(2, 3)], {"steps": 0}, "steps=0 is not possible"),
    ],
)
def test_bad_arguments(module, data, options, message):
    with pytest.raises(ValueError, match=message):
        recompute_statistics(module, data, **options)


def test_a_trained_layer_counts_on_and_forgets_what_is_pending():
    layer = BatchNorm1d(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer(torch.randn(4, 3))
    accumulate_statistics(layer, optimizer)
    layer(torch.randn(4, 3))
    recompute_statistics(layer, batches(4, 6))
    precise = copy.deepcopy(layer.state_dict())
    optimizer.step()
    torch.testing.assert_close(layer.state_dict(), precise, rtol=0, atol=0)
    assert layer.num_batches_tracked == 3


def test_layers_without_statistics_and_empty_batches():
    net = nn.Sequential(BatchNorm1d(3), BatchNorm1d(3, track_running_stats=False))
    data = batches(4, 6)
    recompute_statistics(net, [data[0], torch.zeros(0, 3), data[1]])
    np.testing.assert_allclose(net[0].running_var.numpy(), statistics(data, 1)[1], rtol=1e-6)
    assert net[1].running_mean is None


def recompute_on_rank(rank, parts):
    net = nn.Sequential(BatchNorm1d(3, convention="keras", sync=True), nn.BatchNorm1d(3))
    return recompute_statistics(net, parts[rank]), net.state_dict()


@pytest.mark.slow
def test_ranks_are_merged_also_one_without_data(tmp_path):
    data = batches(4, 9, 2)
    single = nn.Sequential(BatchNorm1d(3, convention="keras"), nn.BatchNorm1d(3))
    recompute_statistics(single, data)
    for parts in ([data[:2], data[2:]], [[], data]):
        directory = tmp_path / str(len(parts[0]))
        directory.mkdir()
        for rank, (count, state) in enumerate(run_on_ranks(recompute_on_rank, 2, directory, parts)):
            assert count == len(parts[rank])
            torch.testing.assert_close(state, single.state_dict())
