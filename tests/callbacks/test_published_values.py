import pytest
from helpers import quiet_trainer, read_events, scalar

from bnlightning import LitMovingAverage, PointsDataModule, PublishedCurve, PublishedValues


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


def fit(trainer, **options):
    trainer.fit(LitMovingAverage(), PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]]), **options)


@pytest.mark.parametrize(("steps", "logged"), [(1, None), (5, {2: 0.5, 4: 0.75}), (9, {2: 0.5, 4: 0.75, 6: 0.875})])
def test_a_curve_is_logged_as_far_as_the_training_goes(steps, logged, tmp_path):
    curve = PublishedCurve("val/acc", [0.5, 0.75, 0.875], every_n_steps=2)
    fit(quiet_trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=[curve]))
    events = read_events(tmp_path)
    assert ("published/val/acc" in events.Tags()["scalars"]) == (logged is not None)
    assert logged is None or scalar(events, "published/val/acc") == logged


def test_accumulated_steps_and_resumed_runs_log_each_value_once(tmp_path):
    def trainer(directory, steps):
        curve = PublishedCurve("val/acc", [0.5, 0.75, 0.875], every_n_steps=1)
        return quiet_trainer(
            directory, max_steps=steps, limit_val_batches=0, callbacks=[curve], accumulate_grad_batches=3, max_epochs=-1
        )

    first = trainer(tmp_path / "first", 2)
    fit(first)
    first.save_checkpoint(tmp_path / "last.ckpt")
    fit(trainer(tmp_path / "second", 3), ckpt_path=str(tmp_path / "last.ckpt"))
    logged = [read_events(tmp_path / name).Scalars("published/val/acc") for name in ("first", "second")]
    assert [[(item.step, item.value) for item in items] for items in logged] == [[(1, 0.5), (2, 0.75)], [(3, 0.875)]]


@pytest.mark.parametrize(
    ("values", "every_n_steps", "message"),
    [
        ([], 1, r"values=\[\] is not possible"),
        ([0.5, float("nan")], 1, r"values\[1\]=nan is not possible: give a number"),
        ([0.5], 0, "every_n_steps=0 is not possible: give an integer of at least 1"),
    ],
)
def test_a_curve_that_is_none_is_named(values, every_n_steps, message):
    with pytest.raises(ValueError, match=message):
        PublishedCurve("val/acc", values, every_n_steps)
