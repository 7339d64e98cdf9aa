import pytest
import torch
from torch import nn

from bnlightning.nn import BatchNorm1d, BatchNorm2d, swap_norm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def trained(module, *shape):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        module(torch.randn(*shape, generator=generator) * 2 + 1)
    return module


def fuse(module, names, qat=False):
    # It takes long to import.
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    return (fuse_modules_qat if qat else fuse_modules)(module, [names])


@pytest.mark.parametrize("convention", ["pytorch", "keras", "tf_fused", "flax"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(3, 4, 3), (5, 3, 6, 6)), (nn.ConvTranspose2d(3, 4, 3), (5, 3, 6, 6))]
)
def test_a_layer_is_folded_into_the_convolution_before_it(convention, layer, shape):
    module = trained(nn.Sequential(layer, BatchNorm2d(4, convention=convention)), *shape).eval()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    fused = fuse(module, ["0", "1"])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), expected)


def test_with_an_activation_and_behind_a_linear_layer():
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.ReLU()), 5, 3, 6, 6).eval()
    x = torch.randn(5, 3, 6, 6)
    expected = module(x)
    torch.testing.assert_close(fuse(module, ["0", "1", "2"])(x), expected)
    linear = trained(nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4)), 9, 3).eval()
    x = torch.randn(5, 3)
    expected = linear(x)
    torch.testing.assert_close(fuse(linear, ["0", "1"])(x), expected)


@pytest.mark.parametrize(("names", "qat"), [(["0", "1"], True), (["1", "2"], False)])
def test_what_would_train_by_another_convention_is_refused_with_the_cure(names, qat):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.ReLU()).train(qat)
    with pytest.raises(RuntimeError, match=r"Call swap_norm\(model, 'torch'\) first"):
        fuse(module, names, qat)
    swap_norm(module, "torch")
    fuse(module, names, qat)
