import numpy as np
import pytest
import torch

from bnlightning import SyntheticRegressionDataModule


def test_points_are_those_of_the_published_script():
    data = SyntheticRegressionDataModule(seed=7)
    data.setup("fit")
    np.random.seed(7)
    x = np.linspace(-7, 10, 2500)
    np.random.shuffle(x)
    noise = np.random.normal(0, 8, x.shape)
    np.testing.assert_array_equal(data.x[:, 0].numpy(), x.astype(np.float32))
    np.testing.assert_array_equal(data.y[:, 0].numpy(), (np.square(x) - 5 + noise).astype(np.float32))


def test_does_not_touch_the_global_generators():
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(())
    np.random.seed(3)
    torch.manual_seed(3)
    SyntheticRegressionDataModule(seed=7).setup("fit")
    assert (np.random.rand(), torch.rand(())) == expected


def test_unshuffled_full_batch():
    data = SyntheticRegressionDataModule(num_points=500, shuffle=False, batch_size=None, noise_std=0.0)
    data.setup("fit")
    ((x, y),) = data.train_dataloader()
    assert x.shape == y.shape == (500, 1) and x.dtype == y.dtype == torch.float32
    assert (x.diff(dim=0) > 0).all()
    torch.testing.assert_close(y, x**2 - 5, rtol=1e-5, atol=1e-5)


def test_training_goes_through_the_points_in_order_and_evaluation_takes_all():
    data = SyntheticRegressionDataModule(num_points=25, batch_size=10)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(x) for x, _ in batches] == [10, 10, 5] and len(data.train_dataloader()) == 3
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), data.x)
    ((x, y),) = data.val_dataloader()
    assert torch.equal(x, data.x) and torch.equal(y, data.y)


@pytest.mark.parametrize(("points", "batch_size", "smallest"), [(20, 10, 10), (21, 10, 1), (5, 10, 5), (20, None, 20)])
def test_smallest_batch(points, batch_size, smallest):
    assert SyntheticRegressionDataModule(num_points=points, batch_size=batch_size).smallest_batch == smallest


def test_another_curve_by_a_subclass():
    class Line(SyntheticRegressionDataModule):
        def target(self, x):
            return 2 * x

    data = Line(noise_std=0.0)
    data.setup("fit")
    torch.testing.assert_close(data.y, 2 * data.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 1}, r"num_points=1 is not possible: give an integer of at least 2"),
        ({"batch_size": 0}, r"batch_size=0 is not possible"),
        ({"batch_size": True}, r"batch_size=True is not possible"),
        ({"noise_std": -1}, r"noise_std=-1 is not possible: give a number of at least 0"),
        ({"x_max": -8.0}, r"x_max=-8.0 is not possible: give a number above -7"),
        ({"seed": -1}, r"seed=-1 is not possible"),
        ({"x_min": float("nan")}, r"x_min=nan is not possible"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticRegressionDataModule(**options)


def test_hyperparameters_are_the_plain_arguments():
    assert dict(SyntheticRegressionDataModule(batch_size=None, seed=3).hparams) == {
        "num_points": 2500,
        "x_min": -7.0,
        "x_max": 10.0,
        "noise_std": 8.0,
        "shuffle": True,
        "batch_size": None,
        "seed": 3,
    }
