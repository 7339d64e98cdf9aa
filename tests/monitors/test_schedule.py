import pytest

from bnlightning.monitors.schedule import Schedule


def test_the_first_step_and_every_further_multiple():
    schedule = Schedule(10)
    assert [step for step in range(3, 45) if schedule.is_due(step)] == [3, 10, 20, 30, 40]


def test_asked_again_at_the_same_step_it_is_not_due():
    schedule = Schedule(5)
    assert schedule.is_due(0) and not schedule.is_due(0)


def test_a_count_that_leaps_over_multiples():
    # Three optimizers that step in every batch.
    schedule = Schedule(10)
    assert [step for step in range(0, 45, 3) if schedule.is_due(step)] == [0, 12, 21, 30, 42]


def test_keys_are_independent():
    schedule = Schedule(10)
    assert schedule.is_due(0, 1) and schedule.is_due(1, 2) and not schedule.is_due(2, 1)
    assert [step for step in range(2, 21) if schedule.is_due(step, 2)] == [10, 20]


@pytest.mark.parametrize(("start", "due"), [(0, [0, 10, 20, 30]), (20, [20, 30]), (21, [30]), (25, [30])])
def test_a_fit_goes_on_if_it_starts_behind_the_last_sample(start, due):
    schedule = Schedule(10)
    for step in range(21):
        schedule.is_due(step)
    resumed = Schedule(10)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.start(start) is (start > 20)
    assert [step for step in range(start, 31) if resumed.is_due(step)] == due
