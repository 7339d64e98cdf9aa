"""Changes of one layer, made and undone. That a whole network keeps what it has is tested in test_swap.py."""

import pytest
import torch
from torch import nn

from bnlightning import BatchNorm1d
from bnlightning.nn._swap_changes import Absent, InPlace, Replacement, class_name


def to_ours(layer, **attributes):
    """As the same layer built by our class, unless ``attributes`` says otherwise."""
    ours = vars(BatchNorm1d(layer.num_features, **attributes))
    return InPlace(layer, BatchNorm1d, {name: value for name, value in ours.items() if name not in vars(layer)})


def test_in_place_and_back():
    layer = nn.BatchNorm1d(3)
    before = dict(vars(layer))
    change = to_ours(layer)
    assert change.after == "bnlightning.BatchNorm1d"
    change.apply()
    assert type(layer) is BatchNorm1d and change.is_intact()
    assert repr(layer) == repr(BatchNorm1d(3))
    change.undo()
    assert type(layer) is nn.BatchNorm1d and vars(layer) == before


def test_an_absent_attribute_is_taken_away_and_given_back():
    layer = BatchNorm1d(3)
    attributes = dict(vars(layer))
    change = InPlace(layer, nn.BatchNorm1d, {"convention": Absent, "eps": 0.5})
    change.apply()
    assert not hasattr(layer, "convention") and layer.eps == 0.5
    change.undo()
    assert vars(layer) == attributes


@pytest.mark.parametrize("is_trained", [False, True])
def test_initial_statistics_change_with_the_convention_and_trained_ones_stay(is_trained):
    layer = nn.BatchNorm1d(3)
    if is_trained:
        layer(torch.randn(8, 3))
    trained = layer.running_var.clone()
    # Its running variance starts from 0, torch's from 1.
    change = to_ours(layer, convention="caffe")
    change.apply()
    torch.testing.assert_close(layer.running_var, trained if is_trained else torch.zeros(3), rtol=0, atol=0)
    change.undo()
    torch.testing.assert_close(layer.running_var, trained if is_trained else torch.ones(3), rtol=0, atol=0)


def test_a_class_that_does_not_fit_leaves_the_layer_as_it_was():
    layer = nn.BatchNorm1d(3)
    attributes = dict(vars(layer))
    with pytest.raises(TypeError, match="__class__"):
        InPlace(layer, int, {"eps": 0.5}).apply()
    assert type(layer) is nn.BatchNorm1d and vars(layer) == attributes


def test_another_class_since_is_noticed():
    layer = nn.BatchNorm1d(3)
    change = InPlace(layer, nn.Identity, vars(nn.Identity()) | {})
    change.apply()
    layer.__class__ = nn.Dropout
    assert not change.is_intact()


def replaced():
    """A network whose layer has two places, and the change that puts a layer norm in both."""
    old, new = nn.BatchNorm1d(3), nn.LayerNorm(3)
    network = nn.Sequential(old, nn.Sequential(old)).eval()
    return network, old, new, Replacement(old, new, [(network, "0"), (network[1], "0")])


def test_a_replacement_has_every_place_and_the_tensors_that_fit():
    network, old, new, change = replaced()
    weight, bias = old.weight, old.bias
    assert change.after == "torch.nn.LayerNorm"
    assert change.note == ("carried over: weight, bias; left behind: running_mean, running_var, num_batches_tracked")
    change.apply()
    assert network[0] is network[1][0] is new and change.is_intact()
    assert new.weight is weight and new.bias is bias and not new.training
    new.weight = nn.Parameter(torch.full((3,), 2.0))
    change.undo()
    assert network[0] is network[1][0] is old
    # What was trained since comes along.
    assert old.weight.tolist() == [2.0, 2.0, 2.0]


def test_hooks_move_with_the_layer_and_their_handles_still_remove_them():
    network, old, new, _ = replaced()
    calls = []
    handle = old.register_forward_hook(lambda *_: calls.append("old"))
    new.register_forward_hook(lambda *_: calls.append("new"))
    change = Replacement(old, new, [(network, "0")])
    change.apply()
    network[0](torch.randn(2, 3))
    assert calls == ["old", "new"]
    handle.remove()
    network[0](torch.randn(2, 3))
    assert calls == ["old", "new", "new"]
    change.undo()
    network[0](torch.randn(2, 3))
    assert calls == ["old", "new", "new"]


def test_a_layer_put_elsewhere_since_is_noticed():
    network, _old, _new, change = replaced()
    change.apply()
    network[1][0] = nn.Identity()
    assert not change.is_intact()


def test_names_are_those_that_classes_are_imported_by():
    class Own(nn.Module):
        pass

    assert class_name(nn.BatchNorm2d(1)) == "torch.nn.BatchNorm2d"
    assert class_name(BatchNorm1d(1)) == "bnlightning.BatchNorm1d"
    assert class_name(Own()) == f"{__name__}.{Own.__qualname__}"
