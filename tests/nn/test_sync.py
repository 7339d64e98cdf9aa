import copy

import pytest
import torch
from helpers import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnlightning import BatchNorm1d, BatchNorm2d
from bnlightning.nn import running_statistics

STEPS = 3


def values(*shape, mean=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + mean


# For two and for three ranks: how many samples each has; some have none.
PARTS = {2: [(5, 4), (9, 0), (8, 1), (0, 9), (1, 8)], 3: [(4, 4, 1), (0, 9, 0), (1, 1, 1)]}
CASES = {
    "plain": (BatchNorm1d, {}, values(9, 3)),
    "far from zero": (BatchNorm1d, {"convention": "keras"}, values(9, 3, mean=1e3)),
    "images": (BatchNorm2d, {"convention": "flax"}, values(9, 3, 4, 2)),
    "debiased": (BatchNorm1d, {"convention": "caffe"}, values(9, 3)),
    "all batches": (BatchNorm1d, {"momentum": None}, values(9, 3)),
    "not affine": (BatchNorm1d, {"affine": False}, values(9, 3)),
    "per activation": (BatchNorm2d, {"convention": "from_scratch"}, values(9, 3, 1, 1)),
    "no statistics": (BatchNorm1d, {"track_running_stats": False}, values(9, 3)),
    "reference": (BatchNorm1d, {"backend": "reference"}, values(9, 3)),
    "float64": (BatchNorm1d, {"dtype": torch.float64}, values(9, 3).double()),
}


def train(layer, x, run=None):
    """Some steps forward and backward: output and gradients of the last one, and the state after it."""
    x = x.clone().requires_grad_()
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, 4.0))
    for step in range(STEPS):
        x.grad = None
        layer.zero_grad()
        output = (layer if run is None else run)(x * 2**step)
        output.sin().sum().backward()
    return output.detach(), x.grad, [p.grad for p in layer.parameters()], copy.deepcopy(layer.state_dict())


def train_on_rank(rank, cases, parts, compiles):
    results = []
    for layer_class, options, x in cases:
        for part in parts:
            layer = layer_class(3, sync=True, **options)
            torch.compiler.reset()
            run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else None
            results.append(train(layer, x.split(part)[rank] if sum(part) == len(x) else x[rank : rank + 1], run))
    return results


OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)
COMPILED = pytest.param(
    2, True, marks=pytest.mark.skipif(OLD, reason="torch 2.6 waits for ever in compiled collectives")
)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "compiles"), [(2, False), (3, False), COMPILED])
def test_ranks_together_give_what_one_process_gives(world_size, compiles, tmp_path):
    # Compiling takes seconds a case.
    parts = PARTS[world_size][:2] if compiles else PARTS[world_size]
    cases = [CASES[name] for name in (["images", "debiased"] if compiles else CASES)]
    ranks = run_on_ranks(train_on_rank, world_size, tmp_path, cases, parts, compiles)
    expected = [
        train(layer_class(3, **options | {"dtype": torch.float64}), x[: sum(part)].double())
        for layer_class, options, x in cases
        for part in parts
    ]
    for *got, (output, grad, parameter_grads, state) in zip(*ranks, expected, strict=True):
        close = {"rtol": 1e-6, "atol": 3e-6, "check_dtype": False}
        torch.testing.assert_close(torch.cat([rank[0] for rank in got]), output, **close)
        torch.testing.assert_close(torch.cat([rank[1] for rank in got]), grad, **close)
        for index, whole in enumerate(parameter_grads):
            torch.testing.assert_close(sum(rank[2][index] for rank in got), whole, **close)
        for rank in got:
            torch.testing.assert_close(rank[3], state, rtol=1e-6, atol=1e-6, check_dtype=False)
        # The running statistics of all ranks are the same to the last bit.
        assert all(torch.equal(rank[3][key], got[0][3][key]) for rank in got for key in state)


def net(sync):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), BatchNorm1d(8, sync=sync), nn.ReLU(), nn.Linear(8, 1))


def fit(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        (model(x) - step).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def fit_on_rank(rank, x):
    return fit(DistributedDataParallel(net(sync=True)), x.chunk(2)[rank])


@pytest.mark.slow
def test_training_on_two_ranks_is_training_on_the_whole_batch(tmp_path):
    x = values(12, 2)
    expected = fit(net(sync=False), x)
    for state in run_on_ranks(fit_on_rank, 2, tmp_path, x):
        torch.testing.assert_close({key.removeprefix("module."): value for key, value in state.items()}, expected)


def by_running_on_rank(rank, x):
    layer = BatchNorm1d(3, sync=True)
    layer(x.chunk(2)[rank])
    running_statistics(layer)
    output = layer(x.split([11, 1])[rank] * 2)
    training = layer.state_dict()
    # In evaluation, without running statistics, too, every rank is by itself.
    alone = BatchNorm1d(3, sync=True, track_running_stats=False).eval()
    return output.detach(), training, (alone(x) if rank == 0 else x.new_zeros(0)).detach()


@pytest.mark.slow
def test_normalising_by_the_running_statistics_and_evaluation(tmp_path):
    x = values(12, 3)
    layer = BatchNorm1d(3)
    layer(x)
    running_statistics(layer)
    output = layer(x * 2)
    ranks = run_on_ranks(by_running_on_rank, 2, tmp_path, x)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), output)
    for _, training, _ in ranks:
        torch.testing.assert_close(training, layer.state_dict())
    torch.testing.assert_close(ranks[0][2], BatchNorm1d(3, track_running_stats=False)(x))


def half_on_rank(rank, x):
    layer = BatchNorm1d(3, sync=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x.split([9, 3])[rank])
    return output, layer.state_dict()


@pytest.mark.slow
def test_half_precision_keeps_float32_statistics(tmp_path):
    x = values(12, 3, mean=100.0).bfloat16()
    layer = BatchNorm1d(3, dtype=torch.float64)
    output = layer(x.double())
    ranks = run_on_ranks(half_on_rank, 2, tmp_path, x)
    assert ranks[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]).double(), output, rtol=0, atol=0.02)
    for _, got in ranks:
        torch.testing.assert_close(got, layer.state_dict(), rtol=1e-6, atol=1e-6, check_dtype=False)


def one_value_on_rank(rank):
    layer = BatchNorm1d(3, sync=True)
    before = copy.deepcopy(layer.state_dict())
    layer(values(1 - rank, 3))
    return before, layer.state_dict()


def empty_on_rank(rank):
    layer = BatchNorm1d(3, sync=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 3, requires_grad=True)
    layer(x).sum().backward()
    return before, layer.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("function", [empty_on_rank, one_value_on_rank])
def test_where_all_ranks_have_less_than_two_values_nothing_is_learnt(function, tmp_path):
    for before, after in run_on_ranks(function, 2, tmp_path):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_alone_it_is_the_layer_without_it():
    x = values(6, 3)
    plain, synced = train(BatchNorm1d(3), x), train(BatchNorm1d(3, sync=True), x)
    torch.testing.assert_close(plain, synced, rtol=0, atol=0)
    assert "sync=True" in repr(BatchNorm1d(3, sync=True))


def torchs_on_rank(rank, x, device):
    layer = nn.SyncBatchNorm(3, device=device)
    try:
        return layer(x.split([5, 4])[rank].to(device)).cpu().detach(), layer.cpu().state_dict()
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_torchs_own_refuses_the_cpu(tmp_path):
    # Why there is ours. If torch learns it, hold ours against it here, too.
    for message in run_on_ranks(torchs_on_rank, 2, tmp_path, values(9, 3), "cpu"):
        assert message.startswith("SyncBatchNorm expected input tensor to be on")
