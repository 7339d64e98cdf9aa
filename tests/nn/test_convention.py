"""Conventions against each framework's own loop, and one of them against the published class that it is named after."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from bnlightning import BatchNorm1d, BatchNorm2d, Convention
from bnlightning.nn import CONVENTIONS
from bnlightning.nn.convention import convention_name

BACKENDS = ["fast", "reference"]


def batches(shape, count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * (k + 1) + k for k in range(count)]


# Each framework's rule as its source has it: decay, eps, degrees of freedom taken off, initial mean and variance.
RULES = {
    "pytorch": (0.9, 1e-5, 1, 0.0, 1.0),
    "keras": (0.99, 1e-3, 0, 0.0, 1.0),
    "tf_fused": (0.99, 1e-3, 1, 0.0, 1.0),
    "tf_ema": (0.7, 1e-3, 0, 0.0, 0.0),
    "flax": (0.99, 1e-5, 0, 0.0, 1.0),
    "caffe": (0.999, 1e-5, 1, 0.0, 0.0),
    "from_scratch": (0.9, 1e-6, 0, 0.0, 0.0),
}


def numpy_running_statistics(name, batches):
    """What evaluation uses after these batches of shape (n, C), by each framework's own loop, in float64."""
    decay, _, ddof, mean, var = RULES[name]
    mean, var, total = np.full(batches[0].shape[1], mean), np.full(batches[0].shape[1], var), 0.0
    for x in batches:
        if name == "caffe":
            mean, var, total = (
                decay * mean + x.mean(axis=0),
                decay * var + x.var(axis=0, ddof=ddof),
                decay * total + 1,
            )
        else:
            mean = decay * mean + (1 - decay) * x.mean(axis=0)
            var = decay * var + (1 - decay) * x.var(axis=0, ddof=ddof)
    return (mean / total, var / total) if name == "caffe" else (mean, var)


def test_every_convention_has_its_rule():
    assert set(RULES) == set(CONVENTIONS)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["averaged by the kernel", "averaged by us", "averaged by us in tensors"])
def test_conventions_against_a_loop_in_numpy(name, n, backend, rule):
    eps = RULES[name][1]
    options = {"momentum": 1 - RULES[name][0], "eps": eps} if name == "tf_ema" else {}
    layer = BatchNorm1d(3, convention=name, backend=backend, dtype=torch.float64, **options)
    if rule == "averaged by us":
        layer.update_rule = lambda layer, mean, var, n: layer.update_running_stats(mean, var, n)
    elif rule == "averaged by us in tensors":
        layer.update_rule = lambda layer, mean, var, n: layer.update_running_stats(mean, var, torch.tensor(n))
    count = 6
    for step in range(1, count + 1):
        layer(batches((n, 3), count)[step - 1].double())
        mean, var = numpy_running_statistics(name, [x.double().numpy() for x in batches((n, 3), count)[:step]])
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-11)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-11)
    test = batches((4, 3))[1].double()
    want = (test.numpy() - mean) / np.sqrt(var + eps)
    np.testing.assert_allclose(layer.eval()(test).detach().numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_the_average_over_all_batches_under_every_convention(name):
    layer = BatchNorm1d(3, momentum=None, eps=1e-3, convention=name, dtype=torch.float64)
    data = batches((5, 3))
    for x in data:
        layer(x.double())
    ddof = RULES[name][2]
    np.testing.assert_allclose(
        layer.running_var.numpy(), np.mean([x.double().numpy().var(axis=0, ddof=ddof) for x in data], axis=0)
    )
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_debiasing_is_accurate_in_float32(steps):
    layer = BatchNorm1d(1, convention="caffe")
    x = torch.tensor([[1.0], [3.0]])
    for _ in range(steps):
        layer(x)
    # A constant is its own average, however few batches there were.
    assert layer.running_mean.item() == pytest.approx(2.0, rel=2e-6)
    assert layer.running_var.item() == pytest.approx(2.0, rel=2e-6)


@pytest.mark.filterwarnings("ignore:momentum=1.0 gives the newest batch")
@pytest.mark.parametrize(("momentum", "share"), [(0.0, [1, 1 / 2, 1 / 3]), (1.0, [1, 1, 1]), (0.5, [1, 2 / 3, 4 / 7])])
@pytest.mark.parametrize("rule", [False, True])
def test_the_share_of_a_batch_when_the_start_is_averaged_out(momentum, share, rule):
    layer = BatchNorm1d(1, convention="caffe", momentum=momentum, dtype=torch.float64)
    if rule:
        layer.update_rule = lambda layer, mean, var, n: layer.update_running_stats(mean, var, n)
    mean = 0.0
    for x, weight in zip(batches((4, 1)), share, strict=False):
        assert float(layer.weight_of_next_batch()) == pytest.approx(weight)
        # As a compiled layer computes it.
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            assert float(layer.weight_of_next_batch()) == pytest.approx(weight)
        layer(x.double())
        mean += weight * (x.double().mean().item() - mean)
        assert layer.running_mean.item() == pytest.approx(mean)


@pytest.mark.parametrize(("layer_class", "shape"), [(BatchNorm1d, (6, 4, 5)), (BatchNorm2d, (6, 3, 2, 4))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_per_activation(layer_class, shape, backend):
    features = int(np.prod(shape[1:]))
    layer = layer_class(features, convention="from_scratch", backend=backend, dtype=torch.float64)
    flat = BatchNorm1d(features, convention="keras", eps=1e-6, dtype=torch.float64)
    x = batches(shape)[1].double()
    # Not contiguous, too: the positions must not be mixed up.
    for data in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
        torch.testing.assert_close(layer(data), flat(data.reshape(shape[0], -1)).view(shape))
    assert layer.running_mean.shape == (features,)
    with pytest.raises(ValueError, match=rf"has {features} features a sample, and num_features={shape[1]}"):
        layer_class(shape[1], convention="from_scratch")(x.float())


def test_defaults_are_the_conventions_and_can_be_replaced():
    assert (BatchNorm1d(2).momentum, BatchNorm1d(2).eps) == (0.1, 1e-5)
    assert (BatchNorm1d(2, convention="keras").momentum, BatchNorm1d(2, convention="keras").eps) == (0.01, 1e-3)
    mine = BatchNorm1d(2, momentum=0.5, convention=Convention(momentum=0.2, eps=1e-4, unbiased=False, initial_mean=3.0))
    assert (mine.momentum, mine.eps) == (0.5, 1e-4)
    assert mine.running_mean.tolist() == [3.0, 3.0]
    mine(torch.randn(4, 2))
    mine.reset_running_stats()
    assert mine.running_mean.tolist() == [3.0, 3.0] and mine.num_batches_tracked == 0


def test_names_of_conventions():
    assert {name: convention_name(convention) for name, convention in CONVENTIONS.items()} == {
        name: repr(name) for name in CONVENTIONS
    }
    mine = Convention(momentum=0.2, eps=1e-4, unbiased=False)
    assert convention_name(mine) == repr(mine)


# The numpy class of Saito, "Deep Learning from Scratch", and its traps.
SCRATCH = np.load(Path(__file__).parents[1] / "reference" / "from_scratch.npz")
DIMENSIONS = {"2d": BatchNorm1d, "4d": BatchNorm2d}


def array(dimensions, name):
    return torch.tensor(SCRATCH[f"{dimensions}_{name}"])


def make_layer(dimensions, backend):
    gamma = array(dimensions, "gamma")
    layer = DIMENSIONS[dimensions](len(gamma), convention="from_scratch", backend=backend, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(array(dimensions, "beta"))
    return layer


def check(got, dimensions, name, **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-11} | tolerance
    np.testing.assert_allclose(got.detach().numpy(), SCRATCH[f"{dimensions}_{name}"], **tolerance)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_gradients_and_running_statistics(dimensions, backend):
    layer = make_layer(dimensions, backend)
    for step in (1, 2, 3):
        x = array(dimensions, f"x{step}").requires_grad_()
        layer.zero_grad()
        output = layer.train()(x)
        output.backward(array(dimensions, "dout"))
        check(output, dimensions, f"y{step}")
        if step == 2:
            continue
        suffix = "" if step == 1 else "_after3"
        check(x.grad, dimensions, f"dx{suffix}")
        check(layer.weight.grad, dimensions, f"dgamma{suffix}")
        check(layer.bias.grad, dimensions, f"dbeta{suffix}")
        check(layer.running_mean, dimensions, f"running_mean_{step}")
        check(layer.running_var, dimensions, f"running_var_{step}")
        check(layer.eval()(array(dimensions, "x_test")), dimensions, f"y_test_after{step}")
        if step == 1:
            # Central differences of the class's own forward pass, as exact as these can be.
            for gradient, name in ((x.grad, "dx"), (layer.weight.grad, "dgamma"), (layer.bias.grad, "dbeta")):
                check(gradient, dimensions, f"fd_{name}", rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_given_statistics(dimensions):
    layer = make_layer(dimensions, "fast").eval()
    layer.running_mean.fill_(0.5)
    layer.running_var.fill_(2.0)
    check(layer(array(dimensions, "x_test")), dimensions, "y_test_given_stats")


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_the_untrained_test_mode_gives_the_same_absurd_values_and_says_so(dimensions):
    layer, x = make_layer(dimensions, "fast").eval(), array(dimensions, "x_test")
    with pytest.warns(UserWarning, match="running statistics that no batch has updated: their variance is 0"):
        output = layer(x)
    check(output, dimensions, "y_test_untrained")
    assert output.abs().max() > 500
    # Once trained, also by a single batch, it is silent.
    layer.train()(array(dimensions, "x1"))
    layer.eval()(x)


def test_an_untrained_layer_whose_variance_starts_at_one_is_silent():
    BatchNorm1d(3).eval()(torch.randn(4, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_after_a_test_mode_forward_is_of_that_forward_and_not_of_the_last_training_batch(backend):
    layer = make_layer("2d", backend)
    layer(array("2d", "x1")).backward(array("2d", "dout"))
    layer.zero_grad()
    x = array("2d", "x_test").requires_grad_()
    assert torch.autograd.gradcheck(layer.eval(), x)
    layer(x).backward(array("2d", "dout"))
    normalised = (array("2d", "x_test") - layer.running_mean) / (layer.running_var + 1e-6).sqrt()
    torch.testing.assert_close(layer.weight.grad, (array("2d", "dout") * normalised).sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_a_batch_of_one_whose_output_would_be_the_shift_everywhere_is_refused(dimensions, backend):
    layer = make_layer(dimensions, backend)
    with pytest.raises(ValueError, match=r"has 1 value\(s\) per channel.*needs at least 2: use a larger batch"):
        layer(array(dimensions, "x1")[:1])
    assert layer.num_batches_tracked == 0
