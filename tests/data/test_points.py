import lightning
import pytest
import torch

from bnlightning import PointsDataModule


def test_serves_the_points_in_their_order():
    data = PointsDataModule(x=[[0, 1], [2, 3], [4, 5]], y=[[1.5], [2.5], [3.5]], batch_size=2)
    assert isinstance(data, lightning.LightningDataModule)
    batches = list(data.train_dataloader())
    assert [len(x) for x, _ in batches] == [2, 1] and data.smallest_batch == 1
    for loader in (data.val_dataloader(), data.test_dataloader()):
        ((x, y),) = loader
        assert x.tolist() == [[0, 1], [2, 3], [4, 5]] and y.tolist() == [[1.5], [2.5], [3.5]]
        assert x.dtype == y.dtype == torch.float32


def test_takes_all_points_by_default():
    data = PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
    assert data.batch_size == data.smallest_batch == data.num_points == 2 and len(data.train_dataloader()) == 1
    assert dict(data.hparams) == {"x": [[0.0], [1.0]], "y": [[3.0], [4.0]], "batch_size": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": [0.0, 1.0]}, r"x=\[0.0, 1.0\] is not possible: give rows of numbers, such as"),
        ({"x": [[0.0], [1.0, 2.0]]}, r"x=.* is not possible: give rows of numbers"),
        ({"y": [["a"], ["b"]]}, r"y=.* is not possible: give rows of numbers"),
        ({"y": []}, r"y=\[\] is not possible: give rows of numbers"),
        ({"y": [[3.0]]}, "x has 2 points and y has 1: give one row of y for each of x"),
        ({"batch_size": 0}, "batch_size=0 is not possible: give an integer of at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PointsDataModule(**({"x": [[0.0], [1.0]], "y": [[3.0], [4.0]]} | options))
