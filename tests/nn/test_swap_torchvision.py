"""The promise of swap_norm and our layers on whole networks: to ours and back, and nothing is lost.

The networks are all classification models of torchvision that have batch norm.
"""

import pytest
import torch
import torchvision
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.regnet import BlockParams, RegNet

from bnlightning import BatchNorm2d, swap_norm

WITHOUT = {"alexnet", "vgg11", "vgg13", "vgg16", "vgg19"}
FAMILIES_WITHOUT = ("convnext", "squeezenet", "swin", "vit")
# The smallest of each family; the others take minutes together.
SMALL = {
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x0_5",
}
# What the strides and windows of the network ask for.
SIZES = {"inception_v3": 299, "maxvit_t": 224}


# As many parameters as a machine has memory for; its blocks are those of regnet_y_32gf.
ON_META_ALONE = {"regnet_y_128gf"}


def has_none(name):
    return name in WITHOUT or name.startswith(FAMILIES_WITHOUT)


def build(name):
    # Torchvision warns if these two are not told.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=5, **options)


NAMES = torchvision.models.list_models(module=torchvision.models)
MODELS = [
    pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow)
    for name in NAMES
    if not has_none(name) and name not in ON_META_ALONE
]


def state_of(model):
    """A state_dict that a step leaves alone; parameters are not copied, because they do not change and are large."""
    state, buffers = model.state_dict(), dict(model.named_buffers())
    state.update({name: buffers[name].clone() for name in buffers.keys() & state.keys()})
    return state


def one_step(model, x):
    """Outputs, auxiliary ones too, buffers and gradients."""
    model.zero_grad(set_to_none=True)
    # Of dropout and stochastic depth.
    torch.manual_seed(1)
    outputs = model(x)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return [output.detach() for output in outputs], dict(state_of(model)), gradients


def assert_agree(got, want, tolerance):
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=tolerance, atol=tolerance)
    assert got[2].keys() == want[2].keys()
    # Against the largest of all: before a normalisation some gradients are zero but for rounding.
    atol = tolerance * max(gradient.abs().max().item() for gradient in want[2].values())
    for name, gradient in want[2].items():
        # The first because it is much faster than the second.
        if not torch.equal(got[2][name], gradient):
            torch.testing.assert_close(got[2][name], gradient, rtol=tolerance, atol=atol)


def check(name, tolerance, dtype, **options):
    model = build(name).to(dtype)
    size = SIZES.get(name, 32)
    x = torch.randn(4 if size < 200 else 2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(2))
    objects = dict(model.named_modules())
    classes = {path: type(layer) for path, layer in objects.items()}
    layers = [path for path, layer in objects.items() if isinstance(layer, _BatchNorm)]
    assert layers
    for training in (True, False):
        model.train(training)
        start = state_of(model)
        want = one_step(model, x)

        model.load_state_dict(start, strict=True)
        report = swap_norm(model, "custom", **options)
        assert [path for each in report.swapped for path in each.paths] == layers
        assert all(type(objects[path]) is BatchNorm2d for path in layers)
        assert_agree(one_step(model, x), want, tolerance)

        model.load_state_dict(start, strict=True)
        report.revert()
        assert {path: type(layer) for path, layer in model.named_modules()} == classes
        assert all(layer is objects[path] for path, layer in model.named_modules())
        assert_agree(one_step(model, x), want, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_to_ours_and_back(name):
    check(name, 1e-5, torch.float32)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"])
def test_to_the_reference_and_back(name):
    # In float32 another order of summation grows from layer to layer to a few per cent: four values a channel in the
    # last layers, whose variance may be close to zero.
    check(name, 1e-7, torch.float64, backend="reference")


def test_to_ours_and_back_without_memory():
    # As torchvision.models.regnet_y_128gf has it, which itself asks for the values of tensors.
    blocks = BlockParams.from_init_params(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25)
    with torch.device("meta"):
        model = RegNet(blocks)
    classes = {path: type(layer) for path, layer in model.named_modules()}
    layers = [path for path, cls in classes.items() if issubclass(cls, _BatchNorm)]
    state = model.state_dict(keep_vars=True)
    report = swap_norm(model, "custom")
    swapped = dict(model.named_modules())
    assert layers and all(type(swapped[path]) is BatchNorm2d for path in layers)
    for _ in range(2):
        now = model.state_dict(keep_vars=True)
        assert now.keys() == state.keys() and all(now[key] is state[key] for key in state)
        report.revert()
    assert {path: type(layer) for path, layer in model.named_modules()} == classes


def test_the_others_have_no_batch_norm():
    for name in filter(has_none, NAMES):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        assert not any(isinstance(layer, _BatchNorm) for layer in model.modules()), name
