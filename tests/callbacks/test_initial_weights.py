import numpy as np
import pytest
import torch
from helpers import quiet_trainer

from bnlightning import InitialWeights, LitRegressor, SyntheticRegressionDataModule


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


class Recorder(LitRegressor):
    """Takes down the first layer's weight in front of its first validation and training batches."""

    def on_validation_start(self):
        self.validated = self.net.linear1.weight.clone()

    def on_train_start(self):
        self.started = self.net.linear1.weight.clone()


def make():
    torch.manual_seed(0)
    return Recorder(depth=1, width=3), SyntheticRegressionDataModule(num_points=40)


def test_a_fit_and_an_evaluation_before_it_start_from_the_files_weights(tmp_path):
    weight = np.arange(3, dtype=np.float32)[:, None]
    model, data = make()
    other = model.net.output.weight.clone()
    callback = InitialWeights(save(tmp_path / "weights.npz", **{"net.linear1.weight": weight}))
    trainer = quiet_trainer(max_steps=2, callbacks=[callback])
    trainer.fit(model, data)
    assert (model.started == torch.from_numpy(weight)).all()
    assert (model.net.output.weight != other).any()
    trained = model.net.linear1.weight.clone()
    # Nothing of what was trained is lost later.
    quiet_trainer(max_steps=1, callbacks=[callback]).fit(model, data)
    assert (model.started == trained).all()


def test_an_evaluation_before_the_fit_is_of_the_files_weights(tmp_path):
    weight = np.arange(3, dtype=np.float32)[:, None]
    model, data = make()
    callback = InitialWeights(save(tmp_path / "weights.npz", **{"net.linear1.weight": weight}))
    trainer = quiet_trainer(max_steps=1, callbacks=[callback])
    trainer.validate(model, data, verbose=False)
    assert (model.validated == torch.from_numpy(weight)).all()


def test_a_resumed_training_goes_on_from_its_checkpoint(tmp_path):
    path = save(tmp_path / "weights.npz", **{"net.linear1.weight": np.ones((3, 1), dtype=np.float32)})
    model, data = make()
    trainer = quiet_trainer(max_steps=2, callbacks=[InitialWeights(path)])
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trained = model.net.linear1.weight.clone()
    again, data = make()
    quiet_trainer(max_steps=3, callbacks=[InitialWeights(path)]).fit(again, data, ckpt_path=tmp_path / "last.ckpt")
    assert (again.started == trained).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("net.linear1.weight", (1, 3), r"of shape \(1, 3\), which has shape \(3, 1\) in Recorder"),
        ("net.linear9.weight", (3, 1), r"'net.linear9.weight' of shape \(3, 1\), which is not there in Recorder"),
    ],
)
def test_weights_of_another_model_are_refused(name, shape, message, tmp_path):
    model, data = make()
    callback = InitialWeights(save(tmp_path / "weights.npz", **{name: np.ones(shape, dtype=np.float32)}))
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1, callbacks=[callback]).fit(model, data)


@pytest.mark.parametrize("path", ["nowhere.npz", None])
def test_a_missing_file_is_told(path):
    with pytest.raises(ValueError, match=f"^path={path!r} of InitialWeights is not a file"):
        InitialWeights(path)
