import pytest
from matplotlib.figure import Figure

from bnlightning.monitors.record import Entry, Record
from bnlightning.monitors.statistic import Look
from bnlightning.writing.gallery import Gallery, Picture


def gallery():
    return Gallery(
        "norm",
        {"mean_drift": Look("drift")},
        [Picture(name, lambda history, looks: Figure(), f"What health/{name} shows.") for name in "ab"],
    )


def record(step):
    return Record(step, norms={"bn": Entry({"mean_drift": 0.5}, module="BatchNorm1d")})


def test_each_picture_is_told_by_itself_with_its_description_and_only_if_there_is_something_new():
    pictures = gallery()
    pictures.add(record(0))
    assert pictures.drawn() == [] and not pictures.is_due_early
    pictures.add(record(10))
    assert pictures.is_due_early
    told = pictures.drawn()
    assert [list(each.pictures) for each in told] == [["health/a"], ["health/b"]]
    assert {each.step for each in told} == {10}
    assert told[1].describe("health/b") == "What health/b shows."
    assert isinstance(told[1].pictures["health/b"](), Figure)
    assert pictures.drawn() == [] and not pictures.is_due_early


@pytest.mark.parametrize(("epochs", "number"), [(1, 1), (2, 2), (100, 7), (1000, 10)])
def test_drawings_are_logarithmic_in_the_epochs(epochs, number):
    assert sum(map(Gallery.is_due_after, range(epochs))) == number


def test_rows_have_the_numbers_and_the_class_of_their_kind():
    pictures = gallery()
    pictures.add(record(0))
    assert pictures.history.values("mean_drift").tolist() == [[0.5]]
    assert pictures.history.module_of("bn") == "BatchNorm1d"
