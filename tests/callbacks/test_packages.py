import copy
import pickle
import sys

import lightning
import pytest
import pytorch_lightning as pl
import torch
from helpers import read_events, scalar
from lightning.pytorch.callbacks import Checkpoint
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnlightning
from bnlightning import (
    ActivationMonitor,
    BatchNorm1d,
    BatchNormMonitor,
    BatchNormSync,
    GradientMonitor,
    InitialWeights,
    PredictionMonitor,
    PreemptionCheckpoint,
    PublishedCurve,
    PublishedValues,
    SwapNorm,
    TrainingProgressBar,
)
from bnlightning.callbacks._packages import BothPackages, of_lightning, of_this_package

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        return {"prediction": self.net(batch[0])}

    def test_step(self, batch, batch_idx):
        self.log("test/acc", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 1)), batch_size=4)


def pl_trainer(directory, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=pl.loggers.TensorBoardLogger(directory, name="", version=""),
        enable_model_summary=False,
        log_every_n_steps=1,
        max_epochs=2,
        **options,
    )


def test_every_callback_works_in_a_trainer_of_the_other_package(tmp_path):
    swap, bar, checkpoint = SwapNorm("custom"), TrainingProgressBar(), PreemptionCheckpoint(tmp_path / "stopped.ckpt")
    monitors = [ActivationMonitor(1), GradientMonitor(1), BatchNormMonitor(1), PredictionMonitor(1)]
    published = [PublishedValues({"acc": 0.9}), PublishedCurve("train/loss", [0.5], 2)]
    callbacks = [checkpoint, bar, swap, *monitors, *published]
    trainer = pl_trainer(tmp_path, callbacks=callbacks)
    # It takes ours for its own kinds: no second progress bar, no checkpoints that nobody asked for, which come last.
    assert trainer.progress_bar_callback is bar
    assert trainer.callbacks[-1] is checkpoint and trainer.checkpoint_callbacks == [checkpoint]
    model = Net()
    trainer.fit(model, loader(), loader())
    trainer.test(model, loader(), verbose=False)
    assert isinstance(model.net[1], BatchNorm1d) and swap.report is not None
    events = read_events(tmp_path)
    tags = events.Tags()
    assert "layer_hist/net.2" in tags["histograms"] and "health/values_by_step" in tags["images"]
    assert {"health/watched/text_summary", "val/prediction"} <= set(tags["tensors"])
    assert {"health/grad_norm", "norm_mean_drift/net.1", "layer_val_mean/net.2"} <= set(tags["scalars"])
    assert list(scalar(events, "published/acc")) == [4]
    assert list(scalar(events, "published/train/loss")) == [2]


def test_a_plugin_is_taken_by_a_trainer_of_the_other_package(tmp_path):
    plugin, strategy = BatchNormSync(), DDPStrategy(process_group_backend="gloo")
    # It would refuse a plugin that it does not know.
    pl_trainer(tmp_path, plugins=[plugin], strategy=strategy, devices=1, enable_checkpointing=False)
    assert isinstance(plugin, LayerSync)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in bnlightning.__all__
        if isinstance(getattr(bnlightning, name), type)
        and issubclass(getattr(bnlightning, name), (lightning.Callback, BatchNormSync))
    ],
)
def test_every_public_class_counts_under_both_names(name):
    kind = getattr(bnlightning, name)
    assert issubclass(kind, BothPackages)
    made = kind.__new__(kind)
    assert isinstance(made, (pl.Callback, LayerSync)) and isinstance(made, (lightning.Callback, BatchNormSync))


def test_it_counts_once_the_other_package_is_there_and_pickles(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning")

    class Late(BothPackages, Checkpoint):
        pass

    late = Late()
    assert not isinstance(late, pl.callbacks.Checkpoint)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", pl)
    Late()
    assert isinstance(late, pl.callbacks.Checkpoint) and isinstance(late, Checkpoint)
    monitor = pickle.loads(pickle.dumps(copy.deepcopy(ActivationMonitor(3))))
    assert monitor.every_n_steps == 3 and isinstance(monitor, pl.Callback)


def test_initial_weights_and_swaps_behind_a_hook_of_the_module(tmp_path):
    import numpy as np

    class Late(Net):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = Net().net

    model = Late()
    pl_trainer(tmp_path, callbacks=[SwapNorm("none")], enable_checkpointing=False).fit(model, loader(), loader())
    assert isinstance(model.net[1], nn.Identity)
    np.savez(tmp_path / "weights.npz", **{"net.0.bias": np.full(4, 7.0, np.float32)})
    model = Net()
    trainer = pl_trainer(tmp_path, callbacks=[InitialWeights(tmp_path / "weights.npz")], enable_checkpointing=False)
    trainer.validate(model, loader(), verbose=False)
    assert (model.net[0].bias == 7).all()


def test_whose_a_function_is():
    assert of_lightning(pl.LightningModule.setup) and of_lightning(lightning.LightningModule.setup)
    assert not of_lightning(Net.training_step) and not of_lightning(nn.ReLU)
    assert of_this_package(ActivationMonitor) and not of_this_package(Net)
