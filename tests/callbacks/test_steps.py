from types import SimpleNamespace

import pytest

from bnlightning.callbacks._steps import EvaluationCadence, StepAxis, logged_step


def trainer(step, fn="fit", sanity=False, total=100, batches=None, automatic=True):
    """What the callbacks ask a Trainer, without one."""
    epoch_loop = SimpleNamespace() if batches is None else SimpleNamespace(_batches_that_stepped=batches)
    return SimpleNamespace(
        global_step=step,
        sanity_checking=sanity,
        state=SimpleNamespace(fn=fn),
        estimated_stepping_batches=total,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        lightning_module=SimpleNamespace(automatic_optimization=automatic),
    )


def test_the_logged_step_counts_batches_where_lightning_tells():
    # Two optimizers: as many steps again.
    assert logged_step(trainer(8, batches=4)) == 4
    assert logged_step(trainer(8)) == 8


def test_an_evaluation_stands_behind_the_batch_that_has_stepped():
    axis = StepAxis()
    assert axis.evaluation(trainer(6, batches=6)) == 6
    axis.start_batch(trainer(6, batches=6))
    assert axis.batch == 6
    # Amid an accumulation nothing has stepped yet.
    assert axis.evaluation(trainer(6, batches=6)) == 6
    assert axis.evaluation(trainer(7, batches=6)) == 7
    # Raw optimizers do not count.
    assert axis.evaluation(trainer(6, batches=6, automatic=False)) == 7
    assert axis.evaluation(trainer(7, fn="validate", batches=7)) == 7


def test_evaluations_are_due_at_a_distance_and_at_the_end():
    cadence = EvaluationCadence(10)
    due = [step for step in range(0, 101, 4) if cadence.is_due(trainer(step))]
    assert due == [0, 12, 24, 36, 48, 60, 72, 84, 96, 100]


@pytest.mark.parametrize("fn", ["validate", "test"])
def test_an_evaluation_outside_of_a_fit_is_always_due_and_a_sanity_check_never(fn):
    cadence = EvaluationCadence(10)
    assert cadence.is_due(trainer(5, fn=fn)) and cadence.is_due(trainer(5, fn=fn))
    assert not EvaluationCadence(10).is_due(trainer(0, sanity=True))


@pytest.mark.parametrize(("start", "due"), [(5, False), (7, True)])
def test_an_evaluation_of_the_very_weights_that_a_fit_starts_from_counts(start, due):
    cadence = EvaluationCadence(10)
    cadence.is_due(trainer(5, fn="validate"))
    cadence.start(start)
    assert cadence.is_due(trainer(start + 1)) is due


def test_a_resumed_fit_keeps_the_distance():
    cadence = EvaluationCadence(10)
    cadence.resume(20)
    assert [step for step in (22, 28, 30) if cadence.is_due(trainer(step))] == [30]
