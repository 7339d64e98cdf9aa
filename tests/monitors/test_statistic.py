import pickle

import pytest

from bnlightning.monitors.counting.layer_statistics import EFFECTIVE_RANK, gradient_catalogue, layer_catalogue
from bnlightning.monitors.counting.norm_statistics import norm_catalogue
from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.statistic import Catalogue, Look, Statistic, Summary

CATALOGUES = [layer_catalogue(), gradient_catalogue(), norm_catalogue(), parameter_catalogue()]


def test_a_declaration_says_everything():
    half = Statistic("half", lambda x: x / 2 if x else None, "Half of it.", "Small.", look=Look("halves"))
    total = Summary("total", sum, "All of it.", "Small.")
    catalogue = Catalogue("layer", [half], [total], {"hist": "How it is distributed."})
    assert catalogue.numbers(3) == {"half": 1.5} and catalogue.numbers(0) == {}
    assert catalogue.health([1, 2]) == {"total": 3.0}
    assert catalogue.description("half") == "Half of it. Healthy: Small."
    assert catalogue.description("hist") == "How it is distributed."
    assert catalogue.description("other") is None
    assert catalogue.health_description("total") == "All of it. Healthy: Small."
    assert catalogue.looks() == {"half": half.look}


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=["layer", "gradient", "norm", "parameter"])
def test_every_number_of_ours_has_a_name_of_its_own_and_a_meaning(catalogue):
    for declared in (catalogue.statistics, catalogue.summaries):
        names = [one.name for one in declared]
        assert len(set(names)) == len(names)
        for one in declared:
            assert one.description.endswith((".", ")")) and one.healthy.endswith("."), one.name


def test_declarations_are_pickled_with_the_callback_that_holds_them():
    for catalogue in [*CATALOGUES, layer_catalogue([EFFECTIVE_RANK])]:
        copy = pickle.loads(pickle.dumps(catalogue))
        assert [one.name for one in copy.statistics] == [one.name for one in catalogue.statistics]
        assert [one.description for one in copy.summaries] == [one.description for one in catalogue.summaries]


@pytest.mark.parametrize("name", ["val_dead", "test_dead", "a/b", "Dead", "deadUnits", ""])
def test_a_name_that_would_make_another_tag_is_refused(name):
    with pytest.raises(ValueError, match=r"statistics with the name .* are not possible"):
        Catalogue("layer", [Statistic(name, lambda x: x, "It.", "It.")])


def test_a_name_that_is_there_already_is_refused():
    with pytest.raises(ValueError, match="'dead' are there twice"):
        layer_catalogue([*layer_catalogue().statistics, Statistic("dead", lambda x: 0.5, "It.", "It.")])
