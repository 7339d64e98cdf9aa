"""The promise of swap_norm and our layers on whole networks: to ours and back, and nothing is lost.

The networks are all classification models of torchvision that have batch norm.

One network of each kind of block is run, forward and backward. Of all of them the structure is swapped without memory.
"""

from unittest import mock

import pytest
import torch
import torchvision
import torchvision.models.feature_extraction
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.regnet import BlockParams

from bnlightning import BatchNorm2d, swap_norm

WITHOUT = {"alexnet", "vgg11", "vgg13", "vgg16", "vgg19"}
FAMILIES_WITHOUT = ("convnext", "squeezenet", "swin", "vit")
# The smallest with each kind of block.
RUN = [
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x0_5",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("efficientnet_v2_s", "inception_v3", "maxvit_t", "resnext50_32x4d", "vgg11_bn")
    ),
]
# What the strides and windows of the network ask for.
SIZES = {"inception_v3": 299, "maxvit_t": 224}


def has_none(name):
    return name in WITHOUT or name.startswith(FAMILIES_WITHOUT)


NAMES = torchvision.models.list_models(module=torchvision.models)


def build(name):
    # Torchvision warns if these two are not told.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=5, **options)


def build_without_memory(name):
    widths = BlockParams.from_init_params

    def widths_with_values(**options):
        with torch.device("cpu"):
            return widths(**options)

    with torch.device("meta"), mock.patch.object(BlockParams, "from_init_params", widths_with_values):
        return build(name)


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


def evaluation(model, x):
    model.eval()
    with torch.no_grad():
        output = model(x)
    model.train()
    return output


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
    start = state_of(model)
    want = one_step(model, x)
    evaluated = evaluation(model, x)

    model.load_state_dict(start, strict=True)
    report = swap_norm(model, "custom", **options)
    assert_agree(one_step(model, x), want, tolerance)
    torch.testing.assert_close(evaluation(model, x), evaluated, rtol=tolerance, atol=tolerance)

    model.load_state_dict(start, strict=True)
    report.revert()
    assert_agree(one_step(model, x), want, tolerance)


@pytest.mark.parametrize("name", RUN)
def test_to_ours_and_back(name):
    check(name, 1e-5, torch.float32)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"])
def test_to_the_reference_and_back(name):
    # In float32 another order of summation grows from layer to layer to a few per cent: four values a channel in the
    # last layers, whose variance may be close to zero.
    check(name, 1e-7, torch.float64, backend="reference")


def check_structure(name):
    model = build_without_memory(name)
    objects = dict(model.named_modules())
    classes = {path: type(layer) for path, layer in objects.items()}
    layers = [path for path, layer in objects.items() if isinstance(layer, _BatchNorm)]
    state = model.state_dict(keep_vars=True)
    report = swap_norm(model, "custom")
    assert layers and [path for each in report.swapped for path in each.paths] == layers
    swapped = dict(model.named_modules())
    assert all(type(swapped[path]) is BatchNorm2d for path in layers)
    for _ in range(2):
        now = model.state_dict(keep_vars=True)
        assert now.keys() == state.keys() and all(now[key] is state[key] for key in state)
        report.revert()
    assert {path: type(layer) for path, layer in model.named_modules()} == classes
    assert all(layer is objects[path] for path, layer in model.named_modules())


def test_the_structure_of_the_largest_comes_back():
    check_structure("regnet_y_128gf")


@pytest.mark.slow
def test_the_structure_of_all_comes_back():
    for name in NAMES:
        if not has_none(name):
            check_structure(name)


def test_the_others_have_no_batch_norm():
    for name in filter(has_none, NAMES):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        assert not any(isinstance(layer, _BatchNorm) for layer in model.modules()), name


def test_features_can_be_extracted_from_a_network_with_our_layers():
    network, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 32, 32)
    nodes = {"bn1": "first", "layer1.0.bn2": "inner", "layer2": "block"}
    expected = torchvision.models.feature_extraction.create_feature_extractor(network, nodes)(x)
    swap_norm(network, "custom")
    found = torchvision.models.feature_extraction.create_feature_extractor(network, nodes)(x)
    torch.testing.assert_close(found, expected)
