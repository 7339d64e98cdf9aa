import math

import numpy as np
import pytest
import torch

from bnlightning.monitors.counting.firing import CHANCE, SAMPLES_OF_SILENCE, Firing
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey, UnitSums

CPU = torch.device("cpu")


def key_of(units):
    return LayerKey("net.act", is_activation=True, units=units)


def fired(numbers, samples):
    """The sums of a sampled step in which each unit fired for so many of the samples."""
    numbers = np.asarray(numbers, dtype=float)
    nothing = np.zeros_like(numbers)
    return UnitSums(samples, samples, numbers, numbers, numbers, nothing, nothing)


def silent_steps_until_dead(firing, key, samples):
    for step in range(1, 10_000):
        if firing.update(key, fired([0], samples)).all():
            return step
    raise AssertionError("never dead")


@pytest.mark.parametrize("samples", [8, 32, 64, 512])
def test_a_unit_that_has_never_fired_is_dead_after_459_samples(samples):
    firing, key = Firing(), key_of(2)
    for seen in range(samples, 600 + samples, samples):
        # The other unit fires, so the layer is not silent as a whole.
        dead = firing.update(key, fired([0, samples // 2], samples))
        assert dead.tolist() == [seen >= 459, False], seen
    assert 0.99**459 < CHANCE < 0.99**458


@pytest.mark.parametrize("units", [4, 64, 1024])
def test_the_silence_of_a_layer_that_has_never_fired_adds_up(units):
    firing, key, samples = Firing(), key_of(units), 16
    steps = next(step for step in range(1, 100) if firing.update(key, fired([0] * units, samples)).any())
    assert steps * samples == min(512 if units < 4 else math.ceil(918 / units / samples) * samples, 464)


@pytest.mark.parametrize(("share", "samples"), [(0.5, 8), (0.5, 32), (0.25, 16), (0.1, 32), (0.05, 32), (0.05, 100)])
def test_a_unit_is_dead_as_soon_as_chance_does_not_explain_its_silence(share, samples):
    firing, key = Firing(), key_of(1)
    rest = 0.0
    for _ in range(3000 // samples):
        rest += share * samples
        firing.update(key, fired([int(rest)], samples))
        rest -= int(rest)
    needed = math.ceil(math.log(0.01) / math.log(1 - share))
    assert silent_steps_until_dead(firing, key, samples) == math.ceil(needed / samples)


@pytest.mark.parametrize("fires", [1, 2, 5, 13, 32])
def test_the_chance_of_a_silence_is_that_of_an_order_of_the_samples(fires):
    """Against exact integers: of all orders of the samples, those with the fires in front."""
    firing, key = Firing(), key_of(1)
    firing.update(key, fired([fires], 32))
    steps = silent_steps_until_dead(firing, key, 1)
    if 32 + steps < SAMPLES_OF_SILENCE:
        chances = [math.comb(32, fires) / math.comb(32 + silent, fires) for silent in (steps - 1, steps)]
        assert chances[1] <= CHANCE < chances[0]
    else:
        # A single fire tells so little that others rules come first.
        assert fires <= 2 and steps >= SAMPLES_OF_SILENCE


@pytest.mark.parametrize("samples", [8, 32, 128, 512])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.1, 0.5])
def test_at_any_time_at_most_one_percent_of_units_that_fire_are_called_dead(share, samples):
    number, generator = 20_000, np.random.default_rng(0)
    firing, key = Firing(), key_of(number)
    called = [
        firing.update(key, fired(generator.binomial(samples, share, number), samples)).mean()
        for _ in range(4000 // samples)
    ]
    # Four standard deviations of a share of 1 % among so many units.
    assert max(called) <= CHANCE + 4 * math.sqrt(CHANCE / number)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [8, 32, 128, 512])
def test_of_200_000_units_that_fire_for_one_percent_at_most_one_percent_are_called_dead(samples):
    number, generator = 200_000, np.random.default_rng(1)
    firing, key = Firing(), key_of(number)
    for _ in range(6000 // samples):
        called = firing.update(key, fired(generator.binomial(samples, 0.01, number), samples)).mean()
        assert called <= CHANCE


def test_a_unit_that_fires_again_is_alive_at_once_and_may_die_again():
    firing, key = Firing(), key_of(1)
    firing.update(key, fired([20], 40))
    assert silent_steps_until_dead(firing, key, 8) <= 2
    for _ in range(100):
        assert firing.update(key, fired([0], 8)).all()
    assert not firing.update(key, fired([4], 8)).any()
    for _ in range(5):
        firing.update(key, fired([4], 8))
    assert silent_steps_until_dead(firing, key, 8) == 1


def test_what_a_unit_did_long_ago_is_forgotten():
    number, generator = 20_000, np.random.default_rng(0)
    firing, key = Firing(), key_of(number)
    for share, samples in ((0.5, 4000), (0.05, 1600)):
        for _ in range(samples // 32):
            called = firing.update(key, fired(generator.binomial(32, share, number), 32)).mean()
    assert called <= CHANCE + 4 * math.sqrt(CHANCE / number)


def test_a_sample_counts_once_however_many_of_its_positions_fire():
    x = torch.zeros(6, 3, 2, 2)
    x[:4, 1] = 1.0
    x[5, 2, 0, 1] = torch.nan
    for values in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3)):
        accumulators, key = LayerAccumulators(), key_of(3)
        accumulators.update(key, values, 1 if values.shape[1] == 3 else 3)
        assert accumulators.reduce(CPU)[key].units.fired.tolist() == [0, 4, 1]


def test_an_evaluation_looks_at_all_of_its_samples():
    firing, key = Firing(), key_of(3)
    firing.update(key, fired([50, 1, 0], 100))
    # The first fires for half of the samples, so eight are enough. What is known of the others is too little.
    assert firing.of_evaluation(key, fired([0, 0, 0], 8)).tolist() == [True, False, False]
    assert firing.of_evaluation(key, fired([0, 0, 0], 459)).tolist() == [True, True, True]
    assert firing.of_evaluation(key, fired([1, 0, 0], 459)).tolist() == [False, True, True]
    # The third has been silent for 100 samples of training, too.
    assert firing.of_evaluation(key, fired([1, 1, 0], 359)).tolist() == [False, False, True]
    # An evaluation leaves no trace.
    assert not firing.update(key, fired([1, 1, 0], 8)).any()


def test_a_resumed_training_knows_what_one_without_a_break_knows():
    generator = np.random.default_rng(0)
    steps = [fired(generator.binomial(16, [0.5, 0.02, 0.3, 0.0]), 16) for _ in range(60)]
    whole, broken, key = Firing(100), Firing(100), key_of(4)
    for index, step in enumerate(steps):
        if index == 30:
            resumed = Firing(100)
            resumed.load_state_dict(broken.state_dict())
            broken = resumed
        np.testing.assert_array_equal(whole.update(key, step), broken.update(key, step))
    broken.clear()
    assert broken.state_dict() == []
