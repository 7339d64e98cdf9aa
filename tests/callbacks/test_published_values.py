import pytest
from helpers import quiet_trainer, read_events, scalar

from bnlightning import LitMovingAverage, PointsDataModule, PublishedValues


def test_logs_what_was_published_beside_what_the_test_measures(tmp_path):
    published = PublishedValues({"scale": 0.5, "loss": 0.25})
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[published])
    model, data = LitMovingAverage(), PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    events = read_events(tmp_path)
    assert scalar(events, "published/scale") == {3: 0.5} and scalar(events, "published/loss") == {3: 0.25}
    assert list(scalar(events, "test/scale")) == [3]


@pytest.mark.parametrize(("steps", "logged"), [(1, {1: 0.5}), (2, None)])
def test_values_of_another_step_are_not_logged(steps, logged, tmp_path):
    published = PublishedValues({"scale": 0.5}, step=1)
    trainer = quiet_trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=[published])
    model, data = LitMovingAverage(), PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    events = read_events(tmp_path)
    assert ("published/scale" in events.Tags()["scalars"]) == (logged is not None)
    assert logged is None or scalar(events, "published/scale") == logged


@pytest.mark.parametrize("value", ["0.5", float("nan"), None])
def test_a_value_that_is_none_is_named(value):
    with pytest.raises(ValueError, match=r"values\['acc'\]=.* is not possible: give a number"):
        PublishedValues({"acc": value})


def test_a_step_that_is_none_is_named():
    with pytest.raises(ValueError, match="step=-1 is not possible: give an integer of at least 0"):
        PublishedValues({"acc": 0.5}, step=-1)
