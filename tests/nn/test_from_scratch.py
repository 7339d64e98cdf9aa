"""The numpy class of "Deep Learning from Scratch" (tests/reference/from_scratch.npz), and its traps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bnlightning import BatchNorm1d, BatchNorm2d

ARRAYS = np.load(Path(__file__).parents[1] / "reference" / "from_scratch.npz")
BACKENDS = ["fast", "reference"]
DIMENSIONS = {"2d": BatchNorm1d, "4d": BatchNorm2d}


def array(dimensions, name):
    return torch.tensor(ARRAYS[f"{dimensions}_{name}"])


def make_layer(dimensions, backend):
    gamma = array(dimensions, "gamma")
    layer = DIMENSIONS[dimensions](len(gamma), convention="from_scratch", backend=backend, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(array(dimensions, "beta"))
    return layer


def check(got, dimensions, name, **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-11} | tolerance
    np.testing.assert_allclose(got.detach().numpy(), ARRAYS[f"{dimensions}_{name}"], **tolerance)


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
