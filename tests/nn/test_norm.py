import pytest
import torch
from torch import nn

from bnlightning import BatchNorm1d, BatchNorm2d
from bnlightning.nn import NORM_LAYERS, get_norm_layer


def test_norm_layers_by_name():
    options = {"eps": 1e-2, "momentum": 0.5, "convention": "keras", "backend": "reference"}
    assert isinstance(get_norm_layer("none", **options)(3), nn.Identity)
    theirs, ours = get_norm_layer("torch", **options)(3), get_norm_layer("custom", **options)(3)
    assert type(theirs) is nn.BatchNorm1d and type(ours) is BatchNorm1d
    assert theirs.eps == ours.eps == 1e-2 and theirs.momentum == ours.momentum == 0.5
    assert ours.backend == "reference" and not ours.convention.unbiased
    assert type(get_norm_layer("custom", 2)(3)) is BatchNorm2d and type(get_norm_layer("torch", 3)(3)) is nn.BatchNorm3d
    with pytest.raises(ValueError, match="dims=4 is not possible"):
        get_norm_layer("custom", 4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_name_has_a_layer_of_every_dimension(dims):
    input = torch.randn(4, 3, *[2] * dims)
    assert {name: get_norm_layer(name, dims)(3)(input).shape for name in NORM_LAYERS} == dict.fromkeys(
        NORM_LAYERS, input.shape
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_norm_layer("batch"), "norm='batch' is not known: choose one of none, custom, torch"),
        (lambda: get_norm_layer("custom", epsilon=1), r"norm_options={'epsilon': 1} do not fit norm='custom'"),
        (lambda: get_norm_layer("torch", epsilon=1), r"norm_options={'epsilon': 1} do not fit norm='torch'"),
    ],
)
def test_unknown_names_and_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
