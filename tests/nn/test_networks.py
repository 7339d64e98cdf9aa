import pytest
import torch
from torch import nn

from bnlightning import MLP, BatchNorm1d
from bnlightning.nn import ACTIVATIONS, get_act_layer, get_norm_layer, init_normal_


def test_mlp_has_the_same_paths_whatever_its_normalisation():
    plain = MLP([1, 3, 4, 2])
    normalised = MLP([1, 3, 4, 2], norm_layer=BatchNorm1d, act_layer=nn.Tanh, normalize_input=True)
    names = ["input_norm", "linear1", "norm1", "act1", "linear2", "norm2", "act2", "output"]
    assert [name for name, _ in plain.named_children()] == names
    assert [name for name, _ in normalised.named_children()] == names
    assert isinstance(plain.input_norm, nn.Identity) and isinstance(normalised.input_norm, BatchNorm1d)
    assert normalised.linear1.bias is not None and not isinstance(normalised.output, BatchNorm1d)
    assert normalised(torch.randn(5, 1)).shape == (5, 2)


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
    assert get_act_layer(name)()(torch.zeros(2)).shape == (2,)


def test_norm_layers_by_name():
    options = {"eps": 1e-2, "momentum": 0.5, "convention": "keras", "backend": "reference"}
    assert isinstance(get_norm_layer("none", **options)(3), nn.Identity)
    theirs, ours = get_norm_layer("torch", **options)(3), get_norm_layer("custom", **options)(3)
    assert type(theirs) is nn.BatchNorm1d and type(ours) is BatchNorm1d
    assert theirs.eps == ours.eps == 1e-2 and theirs.momentum == ours.momentum == 0.5
    assert ours.backend == "reference" and not ours.convention.unbiased


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_norm_layer("batch"), "norm='batch' is not known: choose one of none, custom, torch"),
        (lambda: get_norm_layer("custom", epsilon=1), r"norm_options={'epsilon': 1} do not fit norm='custom'"),
        (lambda: get_norm_layer("torch", epsilon=1), r"norm_options={'epsilon': 1} do not fit norm='torch'"),
        (lambda: get_act_layer("tan"), "activation='tan' is not known: choose one of elu"),
    ],
)
def test_unknown_names_and_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
