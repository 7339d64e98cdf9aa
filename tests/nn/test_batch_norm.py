import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnlightning import BatchNorm1d, BatchNorm2d, BatchNorm3d, Convention
from bnlightning.nn import CONVENTIONS, batch_statistics

PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (BatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 2)),
    (BatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 2)),
]
BACKENDS = ["fast", "reference"]


def batches(shape, count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * (k + 1) + k for k in range(count)]


@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_by_default_the_same_numbers_as_torch(ours, torchs, shape, backend, momentum, affine):
    mine, theirs = (
        ours(4, momentum=momentum, affine=affine, backend=backend),
        torchs(4, momentum=momentum, affine=affine),
    )
    for x in batches(shape):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, want = mine(a), theirs(b)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        out.sin().sum().backward()
        want.sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert isinstance(mine, torchs)
    mine.eval(), theirs.eval()
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_state_dicts_load_strictly_both_ways():
    mine, theirs = BatchNorm1d(4, convention="keras"), nn.BatchNorm1d(4)
    theirs(torch.randn(8, 4))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conventions_against_a_loop_in_numpy(name, n, backend):
    convention = CONVENTIONS[name]
    momentum = 0.3 if convention.momentum is None else convention.momentum
    eps = 1e-3 if convention.eps is None else convention.eps
    layer = BatchNorm1d(3, eps=eps, momentum=momentum, convention=name, backend=backend, dtype=torch.float64)
    mean = np.full(3, {"tf_ema": 0.0}.get(name, 0.0))
    var = np.full(3, {"tf_ema": 0.0}.get(name, 1.0))
    decay = 1 - momentum
    for x in batches((n, 3), count=6):
        values = x.numpy().astype(np.float64)
        layer(x.double())
        mean = decay * mean + (1 - decay) * values.mean(axis=0)
        var = decay * var + (1 - decay) * values.var(axis=0, ddof=1 if name in ("pytorch", "tf_fused") else 0)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-12)
    test = batches((4, 3))[1].double()
    want = (test.numpy() - mean) / np.sqrt(var + eps)
    np.testing.assert_allclose(layer.eval()(test).detach().numpy(), want, rtol=1e-9)


def test_defaults_are_the_conventions_and_can_be_replaced():
    assert (BatchNorm1d(2).momentum, BatchNorm1d(2).eps) == (0.1, 1e-5)
    assert (BatchNorm1d(2, convention="keras").momentum, BatchNorm1d(2, convention="keras").eps) == (0.01, 1e-3)
    mine = BatchNorm1d(2, momentum=0.5, convention=Convention(momentum=0.2, eps=1e-4, unbiased=False, initial_mean=3.0))
    assert (mine.momentum, mine.eps) == (0.5, 1e-4)
    assert mine.running_mean.tolist() == [3.0, 3.0]
    mine(torch.randn(4, 2))
    mine.reset_running_stats()
    assert mine.running_mean.tolist() == [3.0, 3.0] and mine.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "kears"}, r"convention='kears' is not known: choose one of pytorch, keras"),
        ({"backend": "slow"}, r"backend='slow' is not known: choose one of fast, reference"),
        ({"convention": "tf_ema"}, r"eps=None is not possible: the convention 'tf_ema' has no default"),
        ({"eps": -1.0}, r"eps=-1.0 is not possible: give a number of at least 0"),
        ({"convention": None}, r"convention=None is not known: choose one of pytorch"),
        ({"momentum": 5}, r"momentum=5 is not possible: give the weight of the new batch, from 0 to 1"),
        ({"momentum": "high"}, r"momentum='high' is not possible"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm1d(2, **options)


def test_one_value_per_channel_in_training_only():
    layer = BatchNorm1d(3)
    with pytest.raises(ValueError, match="at least 2"):
        layer(torch.ones(1, 3))
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.ones(1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output_as_in_torch(backend):
    layer, theirs = BatchNorm1d(3, backend=backend), nn.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.zeros(0, 3)).shape == theirs(torch.zeros(0, 3)).shape == (0, 3)
    torch.testing.assert_close(layer.state_dict(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_number_of_channels_is_refused(backend):
    with pytest.raises(ValueError, match=r"input of shape \(8, 1\) has 1 channels: num_features=4"):
        BatchNorm1d(4, backend=backend)(torch.randn(8, 1))


@pytest.mark.parametrize("layer", [BatchNorm1d(3), nn.BatchNorm1d(3), BatchNorm1d(3, track_running_stats=False)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_reads_and_changes_no_running_statistics(layer, training):
    layer = copy.deepcopy(layer).train(training)
    x = torch.randn(16, 3) * 4 + 2
    before = copy.deepcopy(layer.state_dict())
    with batch_statistics(nn.Sequential(layer)):
        output = layer(x)
    torch.testing.assert_close(output.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.training is training


def test_batch_statistics_is_undone_by_an_exception():
    layer = BatchNorm1d(3)
    running_mean = layer.running_mean
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(layer):
        raise RuntimeError("stop")
    assert layer.running_mean is running_mean and layer.track_running_stats


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_keeps_one_graph(backend):
    layer = BatchNorm1d(3, backend=backend)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_repr_names_the_convention():
    assert "convention='keras', backend='fast'" in repr(BatchNorm1d(2, convention="keras"))
