import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import PredictionMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
]

X = torch.linspace(-1, 1, 10, dtype=torch.float64)[:, None]
Y = X.square()


class Line(lightning.LightningModule):
    """Predicts its one weight times x; each step adds 1 to the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def training_step(self, batch):
        return -self.weight

    def validation_step(self, batch):
        return {"prediction": self.weight * batch[0]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(batch_size=4):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def kept(directory):
    """The tensors kept, by step."""
    events = read_events(directory)
    if "val/prediction" not in events.Tags()["tensors"]:
        return {}
    return {item.step: make_ndarray(item.tensor_proto) for item in events.Tensors("val/prediction")}


def fit(directory, *arguments, module=None, **options):
    trainer = quiet_trainer(directory, max_steps=10, callbacks=[PredictionMonitor(*arguments)], **options)
    trainer.fit(module or Line(), loader(batch_size=5), loader())


def test_keeps_every_point_with_the_prediction_of_the_weights_at_that_step(tmp_path):
    fit(tmp_path, 1, num_sanity_val_steps=1)
    found = kept(tmp_path)
    assert list(found) == [2, 4, 6, 8, 10]
    for step, points in found.items():
        assert points.dtype == np.float32
        np.testing.assert_allclose(points, torch.cat([X, Y, step * X], dim=1), rtol=1e-6)


@pytest.mark.parametrize(("every_n_steps", "steps"), [(3, [2, 6, 10]), (4, [2, 6, 10]), (5, [2, 8, 10]), (50, [2, 10])])
def test_evaluations_apart_by_so_many_steps_and_the_last_one(every_n_steps, steps, tmp_path):
    fit(tmp_path, every_n_steps)
    assert list(kept(tmp_path)) == steps


def test_an_evaluation_of_its_own_is_kept(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[PredictionMonitor(50)])
    trainer.validate(Line(), loader(), verbose=False)
    assert list(kept(tmp_path)) == [0]


def test_no_more_than_max_points(tmp_path):
    fit(tmp_path, 50, 6)
    for points in kept(tmp_path).values():
        np.testing.assert_allclose(points[:, 0], X[:6, 0], rtol=1e-6)


@pytest.mark.parametrize("output", [None, torch.zeros(()), {"loss": torch.zeros(())}])
def test_a_module_without_predictions_is_named(output, tmp_path):
    class Without(Line):
        def validation_step(self, batch):
            return output

    with pytest.raises(ValueError, match=r"Without\.validation_step returned .* without a prediction"):
        fit(tmp_path, module=Without())


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"max_points": 0}])
def test_bad_arguments_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}=0 is not possible: give an integer of at least 1"):
        PredictionMonitor(**options)
