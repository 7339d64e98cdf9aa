import copy

import pytest
import torch
from torch import nn

from bnlightning import BatchNorm1d, BatchNorm2d, BatchNorm3d, swap_norm
from bnlightning.nn import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    batch_norm_act,
    batch_statistics,
    running_statistics,
    skip_nonfinite_batches,
)


@pytest.fixture(autouse=True)
def _fused_from_the_first_element(monkeypatch):
    monkeypatch.setattr(batch_norm_act, "FUSED_FROM", 0)


ACTIVATIONS = {
    "elu": nn.ELU(),
    "leaky_relu": nn.LeakyReLU(),
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
LAYERS = [
    (BatchNormAct1d, BatchNorm1d, (8, 4)),
    (BatchNormAct1d, BatchNorm1d, (8, 4, 3)),
    (BatchNormAct2d, BatchNorm2d, (3, 4, 5, 2)),
    (BatchNormAct3d, BatchNorm3d, (3, 4, 2, 3, 2)),
]


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3 + 2


def pair(fused_class, plain_class, activation="relu", **options):
    """The layer, and the two layers it stands for, with the same random parameters."""
    fused, plain = fused_class(4, activation=activation, **options), plain_class(4, **options)
    if plain.affine:
        with torch.no_grad():
            for parameter, seed in ((plain.weight, 1), (plain.bias, 2)):
                parameter.copy_(values(4, seed=seed) - 2)
    fused.load_state_dict(plain.state_dict(), strict=True)
    return fused, nn.Sequential(plain, ACTIVATIONS[activation])


def check_step(fused, two, x, **tolerance):
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, want = fused(a), two(b)
    torch.testing.assert_close(output, want, **tolerance)
    for module, result in ((fused, output), (two, want)):
        module.zero_grad()
        (result * result.detach().cos()).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **tolerance)
    for mine, theirs in zip(fused.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)
    torch.testing.assert_close(fused.state_dict(), two[0].state_dict(), **tolerance)


@pytest.mark.parametrize(("fused_class", "plain_class", "shape"), LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{}, {"convention": "keras"}, {"convention": "caffe"}, {"affine": False}], ids=str)
def test_it_is_the_two_layers(fused_class, plain_class, shape, activation, options):
    fused, two = pair(fused_class, plain_class, activation, dtype=torch.float64, **options)
    for seed in range(3):
        check_step(fused, two, values(*shape, seed=seed, dtype=torch.float64))
    x = values(*shape, seed=3, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), two.eval()(x))
    assert f"activation={activation!r}" in repr(fused)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    layer = BatchNormAct1d(3, activation=activation, dtype=torch.float64)
    x = values(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_float32_is_as_accurate_as_the_two_layers(mean):
    fused, two = pair(BatchNormAct2d, BatchNorm2d)
    exact = copy.deepcopy(two).double()
    x = values(16, 4, 14, 14) + mean
    upstream = values(16, 4, 14, 14, seed=5)
    grads = []
    for module, dtype in ((fused, torch.float32), (two, torch.float32), (exact, torch.float64)):
        inputs = x.detach().to(dtype, copy=True).requires_grad_()
        module(inputs).backward(upstream.to(dtype))
        grads.append(inputs.grad.double())
    mine, theirs = ((grad - grads[2]).abs().max() / grads[2].abs().max() for grad in grads[:2])
    assert mine <= max(2 * theirs, 1e-6)


@pytest.mark.parametrize("change", [None, batch_statistics, running_statistics, skip_nonfinite_batches])
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_everywhere_else_it_is_the_two_layers_too(change, backend):
    fused, two = pair(BatchNormAct1d, BatchNorm1d, "tanh", backend=backend, dtype=torch.float64)
    fused(values(6, 4, dtype=torch.float64)), two(values(6, 4, dtype=torch.float64))
    for module in (fused, two):
        if change is not None:
            change(module)
    check_step(fused, two, values(8, 4, seed=1, dtype=torch.float64))
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert fused(empty).shape == (0, 4)


def test_channels_last_and_half_precision():
    fused, two = pair(BatchNormAct2d, BatchNorm2d, convention="keras")
    x = values(4, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    check_step(fused, two, x, rtol=1e-4, atol=1e-4)
    check_step(fused, two, x.bfloat16(), rtol=0.02, atol=0.05)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)


def test_saved_for_the_backward_pass_are_input_and_output_alone():
    layer, x, saved = BatchNormAct2d(8), torch.randn(16, 8, 14, 14, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() > 8}
    assert large == {x.data_ptr(), output.data_ptr()}


def test_torch_compile_keeps_one_graph():
    torch.compiler.reset()
    fused, two = pair(BatchNormAct1d, BatchNorm1d, "elu", convention="keras")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = values(8, 4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sin().sum().backward()
    two(b).sin().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(fused.state_dict(), two[0].state_dict())


def test_an_output_changed_in_place_is_noticed():
    output = BatchNormAct1d(4)(values(6, 4).requires_grad_())
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_it_is_not_swapped_away():
    with pytest.raises(ValueError, match="BatchNormAct1d has its own forward, which would be lost"):
        swap_norm(nn.Sequential(BatchNormAct1d(4)), "torch")


def test_small_batches_are_not_fused(monkeypatch):
    monkeypatch.undo()
    fused, two = pair(BatchNormAct1d, BatchNorm1d, "tanh")
    x = values(6, 4)
    assert torch.equal(fused(x), two(x)) and torch.equal(fused.running_var, two[0].running_var)
    # Differentiable twice, then.
    x = x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(BatchNormAct1d(4, activation="elu", dtype=torch.float64), x)


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation='gelu' is not known: choose one of elu, leaky_relu, relu"):
        BatchNormAct1d(4, activation="gelu")
