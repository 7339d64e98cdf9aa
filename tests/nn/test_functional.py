import numpy as np
import pytest
import torch
from torch import Tensor

from bnlightning.nn.functional import (
    batch_norm_averaging,
    batch_norm_fast,
    batch_norm_inference_fast,
    batch_norm_inference_reference,
    batch_norm_reference,
)

SHAPES = [(2, 3), (8, 5), (10, 30), (4, 3, 7), (3, 2, 4, 5), (2, 3, 2, 3, 2)]
BACKENDS = [batch_norm_reference, batch_norm_fast]


def numpy_batch_norm(x, weight, bias, eps):
    """Batch normalisation and its gradients for dL/dy = cos(y), in float64 and with loops over the channels."""
    y, dx, dw, db = np.empty_like(x), np.empty_like(x), [], []
    mean, var = [], []
    for c in range(x.shape[1]):
        values = x[:, c].ravel()
        n = len(values)
        mu = values.sum() / n
        sigma2 = ((values - mu) ** 2).sum() / n
        std = np.sqrt(sigma2 + eps)
        normal = (values - mu) / std
        out = weight[c] * normal + bias[c]
        grad = np.cos(out)
        # The full Jacobian of the normalised values, row by row.
        jacobian = (np.eye(n) - 1 / n - np.outer(normal, normal) / n) / std
        y[:, c] = out.reshape(x[:, c].shape)
        dx[:, c] = (weight[c] * jacobian.T @ grad).reshape(x[:, c].shape)
        dw.append((grad * normal).sum())
        db.append(grad.sum())
        mean.append(mu)
        var.append(sigma2)
    return y, dx, np.array(dw), np.array(db), np.array(mean), np.array(var)


def inputs(shape, dtype=torch.float64, mean=1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))


@pytest.mark.parametrize("batch_norm", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_agree_with_float64_numpy(batch_norm, shape):
    x, weight, bias = inputs(shape)
    output, mean, var = batch_norm(x, weight, bias, 1e-3)
    output.sin().sum().backward()
    expected = numpy_batch_norm(x.detach().numpy(), weight.detach().numpy(), bias.detach().numpy(), 1e-3)
    for got, want in zip((output, x.grad, weight.grad, bias.grad, mean, var), expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch_norm", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_agrees_with_torchs_layer(batch_norm, shape, affine):
    x, weight, bias = inputs(shape, torch.float32)
    weight, bias = (weight, bias) if affine else (None, None)
    mine = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    output, _, _ = batch_norm(mine, weight, bias, 1e-5)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", BACKENDS)
def test_no_gradient_flows_through_the_statistics(batch_norm):
    _, mean, var = batch_norm(*inputs((6, 2)), 1e-5)
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("batch_norm", BACKENDS)
def test_gradcheck(batch_norm):
    x, weight, bias = inputs((5, 3))
    assert torch.autograd.gradcheck(lambda *a: batch_norm(*a, 1e-5)[0], (x, weight, bias))


def test_fast_can_be_differentiated_twice_and_reference_says_that_it_cannot():
    x, weight, bias = inputs((5, 3))
    assert torch.autograd.gradgradcheck(lambda *a: batch_norm_fast(*a, 1e-5)[0], (x, weight, bias))
    (grad,) = torch.autograd.grad(batch_norm_reference(x, weight, bias, 1e-5)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_reference_gives_only_the_gradients_asked_for(needs):
    tensors = [t.detach().requires_grad_(need) for t, need in zip(inputs((6, 2)), needs, strict=True)]
    batch_norm_reference(*tensors, 1e-5)[0].sin().sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_norm", BACKENDS)
def test_half_precision_keeps_float32_statistics(batch_norm, dtype):
    x, _, _ = inputs((64, 4), torch.float32, mean=100.0)
    half = x.detach().to(dtype)
    output, mean, var = batch_norm(half, None, None, 1e-5)
    assert output.dtype == dtype and mean.dtype == var.dtype == torch.float32
    exact = half.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(0, correction=0), rtol=1e-5, atol=0)


def relative_errors(batch_norm, x):
    """The largest error in variance (by channel), output and gradients, relative to the largest true value."""
    weight, bias = torch.linspace(0.5, 2, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    results = []
    for dtype, function in ((torch.float32, batch_norm), (torch.float64, batch_norm_reference)):
        inputs = [t.to(dtype).requires_grad_() for t in (x.detach(), weight, bias)]
        output, _, var = function(*inputs, 1e-5)
        gradients = torch.autograd.grad(output, inputs, upstream.to(dtype))
        results.append([t.double() for t in (output, *gradients, var)])
    *got, var = results[0]
    *want, true_var = results[1]
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)]
    return dict(
        zip(["y", "dx", "dw", "db", "var"], [*errors, ((var - true_var) / true_var).abs().max().item()], strict=True)
    )


@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("std", [1.0, 0.01])
@pytest.mark.parametrize("layout", ["(200, 300)", "(16, 8, 14, 14)", "channels_last"])
def test_reference_is_accurate_wherever_the_mean_is(mean, std, layout):
    shape = (200, 300) if layout == "(200, 300)" else (16, 8, 14, 14)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * std + mean
    x = x.float().contiguous(memory_format=torch.channels_last if "last" in layout else torch.contiguous_format)
    errors = relative_errors(batch_norm_reference, x)
    assert errors["var"] <= 1e-6 and errors["y"] <= 1e-6 and errors["dx"] <= 1e-6
    assert errors["dw"] <= 2e-6 and errors["db"] <= 2e-6


@pytest.mark.parametrize("shape", [(200, 300), (64, 16, 28, 28)])
def test_fast_is_as_accurate_as_torchs_kernels(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    errors = relative_errors(batch_norm_fast, x)
    assert all(errors[name] <= 1e-6 for name in ("var", "y", "dx")) and max(errors["dw"], errors["db"]) <= 2e-6
    # Their output is a folded a·x + b, in which the digits of a large mean are lost; the variance is not.
    errors = relative_errors(batch_norm_fast, x + 1e3)
    assert errors["var"] <= 2e-6 and errors["y"] <= 1e-3


@pytest.mark.parametrize("unbiased", [True, False])
def test_averaging_in_the_kernel(unbiased):
    x, weight, bias = inputs((7, 3, 4))
    mean, var = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 5.0, 6.0]).double()
    running_mean, running_var = mean.clone(), var.clone()
    output = batch_norm_averaging(x, running_mean, running_var, weight, bias, 0.3, 1e-3, unbiased)
    torch.testing.assert_close(output, batch_norm_reference(x, weight, bias, 1e-3)[0])
    values = x.detach().numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(running_mean.numpy(), 0.7 * mean.numpy() + 0.3 * values.mean(axis=1))
    np.testing.assert_allclose(running_var.numpy(), 0.7 * var.numpy() + 0.3 * values.var(axis=1, ddof=int(unbiased)))
    assert torch.autograd.gradcheck(
        lambda x: batch_norm_averaging(x, mean.clone(), var.clone(), None, None, 0.3, 1e-3, unbiased), x
    )


@pytest.mark.parametrize("batch_norm", BACKENDS)
def test_one_value_per_channel_is_refused(batch_norm):
    with pytest.raises(ValueError, match=r"shape \(1, 3\) has 1 value.*larger batch"):
        batch_norm(torch.ones(1, 3), None, None, 1e-5)


def running(channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    mean, var = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    return mean.to(dtype), var.to(dtype)


@pytest.mark.parametrize("inference", [batch_norm_inference_reference, batch_norm_inference_fast])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_inference_agrees_with_float64_numpy(inference, shape, affine):
    x, weight, bias = inputs(shape)
    mean, var = running(shape[1])
    output = inference(x, mean, var, weight if affine else None, bias if affine else None, 1e-3)
    want = np.empty(shape)
    for c in range(shape[1]):
        scale, shift = (weight[c].item(), bias[c].item()) if affine else (1.0, 0.0)
        normal = (x[:, c].detach().numpy() - mean[c].item()) / np.sqrt(var[c].item() + 1e-3)
        want[:, c] = scale * normal + shift
    np.testing.assert_allclose(output.detach().numpy(), want, rtol=1e-10, atol=1e-11)


def test_reference_inference_rounds_as_tensorflow_does():
    x, weight, bias = inputs((1000, 3), torch.float32)
    mean, var = running(3, torch.float32)
    output = batch_norm_inference_reference(x, mean, var, weight, bias, 1e-3).detach().numpy()
    x, weight, bias, mean, var = (t.detach().numpy() for t in (x, weight, bias, mean, var))
    scale = np.float32(1) / np.sqrt(var + np.float32(1e-3)) * weight
    np.testing.assert_array_equal(output, x * scale + (bias - mean * scale))


def test_reference_inference_has_the_right_gradients_and_keeps_the_dtype():
    x, weight, bias = inputs((4, 3, 5))
    mean, var = running(3)
    arguments = (x, mean.requires_grad_(), var.requires_grad_(), weight, bias)
    assert torch.autograd.gradcheck(lambda *a: batch_norm_inference_reference(*a, 1e-3), arguments)
    half = batch_norm_inference_reference(x.bfloat16(), mean.float(), var.float(), weight.float(), bias.float(), 1e-3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), batch_norm_inference_reference(*arguments, 1e-3), rtol=2e-2, atol=2e-2)
