import pytest
import torch
from torch import nn

from bnlightning.callbacks import saturation_limits
from bnlightning.monitors.catching.selection import (
    checked_choices,
    features,
    has_units,
    is_activation,
    is_chosen,
    is_unknown,
    may_overflow,
    modules_by_path,
    unit_dim,
    user_path,
)
from bnlightning.nn import BatchNorm1d, BatchNormAct1d


class Own(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("module", "values", "beyond"),
    [
        (nn.Tanh(), [-1.0, -0.98, 0.0, 0.995], [True, False, False, True]),
        (nn.Sigmoid(), [0.001, 0.02, 0.5, 0.995], [True, False, False, True]),
        (nn.Hardtanh(-2, 3), [-2.0, -1.9, 2.9, 3.0], [True, False, False, True]),
        (nn.Hardsigmoid(), [0.0, 0.1, 0.9, 1.0], [True, False, False, True]),
        (BatchNormAct1d(3, activation="tanh"), [-1.0, 0.0, 0.995], [True, False, True]),
        (nn.ReLU6(), [0.0, 3.0, 5.9, 6.0], [False, False, False, True]),
    ],
)
def test_saturation_limits(module, values, beyond):
    low, high = saturation_limits(module)
    assert [(value < low) or (value > high) for value in values] == beyond
    assert saturation_limits(nn.ReLU()) is None


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        # What comes behind a layer has its features, wherever they are.
        (nn.Conv1d(3, 7, 1), (2, 7, 9), 1),
        (nn.BatchNorm1d(7), (2, 7, 9), 1),
        (nn.Linear(3, 7), (2, 9, 7), 2),
        (nn.LayerNorm(7), (2, 5, 9, 7), 3),
        (nn.Embedding(5, 7), (2, 9, 7), 2),
        (nn.Conv2d(3, 7, 1), (2, 7, 9, 9), 1),
        (nn.Conv3d(3, 7, 1), (2, 7, 9, 9, 9), 1),
        (nn.GroupNorm(1, 7), (2, 7, 9, 9), 1),
        # Both have the size: as the layer has it.
        (nn.Conv1d(3, 7, 1), (2, 7, 7), 1),
        (nn.Linear(3, 7), (2, 7, 7), 2),
        # A transposition in between.
        (nn.Conv1d(3, 7, 1), (2, 9, 7), 2),
        # Neither has, or nothing is known.
        (nn.Linear(3, 4), (2, 7, 9), 2),
        (nn.Linear(3, 4), (2, 7, 9, 9), 1),
        (nn.ReLU(), (2, 7, 9), 2),
        (nn.ReLU(), (2, 7, 9, 9), 1),
        (nn.ReLU(), (2, 7), 1),
        (nn.ReLU(), (2,), 0),
    ],
)
def test_the_units_are_the_features_of_the_layer_before(layer, shape, dim):
    assert unit_dim(shape, features(layer)) == dim


@pytest.mark.parametrize(
    ("module", "activation", "units", "overflow"),
    [
        (nn.ReLU(), True, True, False),
        (nn.PReLU(), True, True, True),
        (Own(), True, True, True),
        (BatchNormAct1d(3), True, True, True),
        (BatchNorm1d(3), False, False, True),
        (nn.LayerNorm(3), False, False, True),
        (nn.Linear(3, 3), False, False, True),
        (nn.Conv2d(3, 3, 1), False, False, True),
        (nn.Dropout(), False, True, False),
        (nn.MaxPool2d(2), False, True, False),
        (nn.Flatten(), False, True, False),
    ],
)
def test_what_is_known_of_modules(module, activation, units, overflow):
    assert (is_activation(module), has_units(module), may_overflow(module)) == (activation, units, overflow)


NET = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Own()), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, {"1.0", "2"}),
        ("1.*", {"1.0", "1.1"}),
        ("1", {"1"}),
        (nn.Sequential, {"", "1"}),
        (Own, {"1.1"}),
        (lambda name, module: name.startswith("1.") or isinstance(module, nn.Linear), {"0", "1.0", "1.1"}),
        ([nn.Linear, "2", lambda name, module: name == "1.1"], {"0", "1.1", "2"}),
    ],
)
def test_modules_are_chosen_by_type_pattern_and_function(modules, expected):
    choices = checked_choices(modules)
    assert {name for name, module in NET.named_modules() if is_chosen(choices, name, module)} == expected


@pytest.mark.parametrize("modules", [3, [3], [nn.ReLU()], [int], nn.ReLU()])
def test_bad_choices_are_named(modules):
    with pytest.raises(ValueError, match=r"modules=.* is not possible: give types of modules"):
        checked_choices(modules)


def test_paths_are_those_of_the_author():
    assert user_path("net._orig_mod.0._fsdp_wrapped_module._checkpoint_wrapped_module.act") == "net.0.act"


def named(name, base=nn.Module, parameter=None):
    """A module of a class that somebody else wrote."""
    module = type(name, (base,), {"__module__": "somewhere"})()
    if parameter is not None:
        module.weight = nn.Parameter(parameter)
    return module


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("NewGELUActivation QuickGELU FastGELUActivation GELUTanh SiLUActivation ReLUSquaredActivation", "activation"),
        ("MyRelu Swish HardMish SwiGLU XIELUActivation LaplaceActivation Sigmoid Act", "activation"),
        ("RMSNorm LlamaRMSNorm T5LayerNorm LayerNorm2d Gemma2RMSNorm ActNorm LayerNormFp32 rms_norm", "norm"),
        ("ActionHead Prelude Mishap SigmoidFocalLoss LayerScale DropPath Value RotaryEmbedding Normalize", "unknown"),
    ],
)
def test_the_name_of_a_class_tells_what_it_is(names, role):
    for module in map(named, names.split()):
        assert is_chosen(None, "path", module) == (role != "unknown"), module
        assert is_unknown(module) == (role == "unknown"), module
        # Units are of activations. Nothing is known of others, and they may be.
        assert is_activation(module) == has_units(module) == (role != "norm"), module


def test_a_name_is_not_all():
    # It multiplies by a matrix, too.
    assert is_unknown(named("LinearReLU", parameter=torch.eye(2)))
    assert not is_unknown(named("LearnedSwish", parameter=torch.ones(3)))
    # It has parts, which are watched themselves.
    assert not is_chosen(None, "path", named("ConvNormReLU", nn.Sequential).append(nn.ReLU()))
    assert not is_unknown(nn.Linear(2, 2)) and not is_unknown(nn.Dropout()) and not is_unknown(nn.Identity())


@pytest.mark.parametrize("shape", [7, (5, 7), [7]])
def test_features_of_norms_of_others(shape):
    module = named("RMSNorm")
    module.normalized_shape = shape
    assert features(module) == (7, False)


def test_all_paths_of_a_shared_module():
    inner = nn.Sequential(nn.ReLU())
    net = nn.ModuleDict({"a": inner, "b": nn.ModuleDict({"c": inner})})
    # Lightning's loops hold what holds them.
    net["b"].register_module("back", net)
    paths = {one: found for found, one in modules_by_path(net)}
    assert paths[inner] == ["a", "b.c"] and paths[inner[0]] == ["a.0", "b.c.0"]
    assert [found[0] for found, _ in modules_by_path(net)] == [name for name, _ in net.named_modules()]
