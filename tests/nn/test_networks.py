import pytest
import torch
from torch import nn

from bnlightning import MLP, BatchNorm1d, BatchNorm2d, ConvNet
from bnlightning.nn import ACTIVATIONS, get_act_layer, init_normal_, init_variance_scaling_


def test_mlp_has_the_same_paths_whatever_its_normalisation():
    plain = MLP([1, 3, 4, 2])
    normalised = MLP([1, 3, 4, 2], norm_layer=BatchNorm1d, act_layer=nn.Tanh, normalize_input=True)
    names = ["input_norm", "linear1", "norm1", "act1", "linear2", "norm2", "act2", "output", "output_norm"]
    assert [name for name, _ in plain.named_children()] == names
    assert [name for name, _ in normalised.named_children()] == names
    assert isinstance(plain.input_norm, nn.Identity) and isinstance(normalised.input_norm, BatchNorm1d)
    assert normalised.linear1.bias is not None and not isinstance(normalised.output, BatchNorm1d)
    assert normalised(torch.randn(5, 1)).shape == (5, 2)
    assert isinstance(normalised.output_norm, nn.Identity)
    assert isinstance(MLP([1, 3, 2], norm_layer=BatchNorm1d, normalize_output=True).output_norm, BatchNorm1d)


@pytest.mark.parametrize("norm_after_act", [False, True])
def test_conv_net(norm_after_act):
    net = ConvNet(
        (3, 28, 20), [4, 8], [16], 10, conv_norm_layer=BatchNorm2d, linear_norm_layer=nn.BatchNorm1d,
        act_layer=nn.Tanh, norm_after_act=norm_after_act,
    )  # fmt: skip
    pairs = ["norm1 act1", "norm2 act2", "linear_norm1 linear_act1"]
    if norm_after_act:
        pairs = [" ".join(reversed(pair.split())) for pair in pairs]
    names = "conv1 {} pool1 conv2 {} pool2 flatten linear1 {} output".format(*pairs)
    assert " ".join(name for name, _ in net.named_children()) == names
    assert isinstance(net.norm2, BatchNorm2d) and isinstance(net.linear_norm1, nn.BatchNorm1d)
    assert net.linear1.in_features == 8 * 7 * 5 and net(torch.randn(2, 3, 28, 20)).shape == (2, 10)
    plain = ConvNet((1, 28, 28), [4], [], 10)
    assert all(isinstance(layer, nn.Identity) for name, layer in plain.named_children() if "norm" in name)
    assert plain(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((28, 28), [4], [], 10), r"in_shape=\(28, 28\) is not possible: give channels, height and width"),
        (((1, 28, 0), [4], [], 10), "in_shape=0"),
        (((1, 28, 28), [], [], 10), r"channels=\[\] is not possible"),
        (((1, 28, 28), [0], [], 10), "channels=0"),
        (((1, 4, 28), [4, 4, 4], [], 10), "3 poolings leave nothing of an image of 4x28"),
        (((1, 28, 28), [4], [0], 10), "features=0"),
        (((1, 28, 28), [4], [], 0), "num_outputs=0"),
    ],
)
def test_conv_net_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(*arguments)


def test_conv_net_names_an_even_kernel():
    with pytest.raises(ValueError, match="kernel_size=4 is not possible: give an odd number"):
        ConvNet((1, 28, 28), [4], [], 10, kernel_size=4)


@pytest.mark.parametrize(("layer", "fan_in"), [(nn.Linear(400, 300), 400), (nn.Conv2d(40, 300, 3), 360)])
def test_variance_scaling_is_a_truncated_normal_distribution(layer, fan_in):
    torch.manual_seed(0)
    init_variance_scaling_(layer, 2.0)
    std = (2.0 / fan_in) ** 0.5
    assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
    # Of a normal distribution cut at two standard deviations: to there, and close to there.
    assert 0.99 < layer.weight.abs().max().item() / (2 * std / 0.8796256610342398) <= 1.0
    # A third of its values is within 0.40996 standard deviations of that normal distribution.
    inside = (layer.weight.abs() < 0.40996 * std / 0.8796256610342398).float().mean().item()
    assert inside == pytest.approx(1 / 3, abs=0.01)
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("features", [[], [1], [1, 0, 1], [1, -3, 1], [1, 2.5, 1]])
def test_mlp_names_bad_features(features):
    with pytest.raises(ValueError, match="features="):
        MLP(features)


def test_init_normal_draws_the_weights_and_sets_the_biases():
    torch.manual_seed(0)
    net = MLP([200, 200, 200])
    init_normal_(net, std=2.0, bias=0.1)
    weights = torch.cat([net.linear1.weight.flatten(), net.output.weight.flatten()])
    assert weights.std().item() == pytest.approx(2.0, rel=0.02) and weights.mean().item() == pytest.approx(0, abs=0.03)
    assert (net.output.bias == 0.1).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name):
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(get_act_layer(name)()(x), getattr(torch.nn.functional, name)(x), rtol=0, atol=0)


def test_impossible_draws_are_named():
    with pytest.raises(ValueError, match=r"std=-1\.0 is not possible: give a number of at least 0"):
        init_normal_(nn.Linear(2, 2), std=-1.0, bias=0.0)
    with pytest.raises(ValueError, match="scale=0 is not possible: give a number above 0"):
        init_variance_scaling_(nn.Linear(2, 2), scale=0)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation='tan' is not known: choose one of elu"):
        get_act_layer("tan")


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP([3, 4, 2], norm_layer=BatchNorm1d, normalize_input=True), (5, 3)),
        (ConvNet((3, 8, 8), [4], [6], 2, conv_norm_layer=BatchNorm2d, linear_norm_layer=BatchNorm1d), (5, 3, 8, 8)),
    ],
    ids=["mlp", "conv net"],
)
def test_networks_can_be_traced(network, shape):
    x = torch.randn(shape)
    network.eval()
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))
