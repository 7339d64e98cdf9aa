import csv
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from bnlightning import BatchNorm1d, LitRegressor, SyntheticRegressionDataModule
from bnlightning.nn import batch_statistics

REFERENCE = Path(__file__).parents[1] / "reference"
OPTIONS = {"eps": 1e-3, "momentum": 0.5, "convention": "tf_ema", "backend": "reference"}


def starting_costs():
    with (REFERENCE / "costs.csv").open() as file:
        return {
            (row["activation"], row["norm"], int(row["seed"])): float(row["step0"])
            for row in csv.DictReader(file)
            if row["experiment"] == row["activation"]
        }


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("norm", ["none", "custom"])
def test_starting_cost_from_given_weights_is_the_original_systems(seed, activation, norm):
    model = LitRegressor(norm=norm, norm_options=OPTIONS, activation=activation, eval_statistics="batch")
    with np.load(REFERENCE / "initial_weights.npz") as weights:
        for index, layer in enumerate(layer for layer in model.net if isinstance(layer, nn.Linear)):
            layer.weight.data = torch.tensor(weights[f"seed{seed}_{'nobn' if norm == 'none' else 'bn'}_W{index}"].T)
    data = SyntheticRegressionDataModule(seed=seed)
    data.setup("validate")
    (metrics,) = quiet_trainer().validate(model, data, verbose=False)
    with batch_statistics(model.double()):
        exact = F.mse_loss(model(data.x.double()), data.y.double()).item()
    # Two roundings apart: in float64 it is theirs alone, and ours is against float64, so that no processor decides.
    assert exact == pytest.approx(starting_costs()[activation, norm, seed], rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(exact, rel=1e-5)


def test_trains_as_a_bare_loop_does():
    data = SyntheticRegressionDataModule(num_points=100, seed=1)
    data.setup("fit")
    lightning.seed_everything(1)
    model = LitRegressor(norm_options=OPTIONS, depth=3)
    lightning.seed_everything(1)
    bare = LitRegressor(norm_options=OPTIONS, depth=3)
    quiet_trainer(max_steps=10, limit_val_batches=0).fit(model, data)
    optimizer = torch.optim.SGD(bare.net.parameters(), lr=1e-3)
    for start in range(0, 100, 10):
        optimizer.zero_grad()
        F.mse_loss(bare.net(data.x[start : start + 10]), data.y[start : start + 10]).backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), bare.state_dict(), rtol=0, atol=0)


def test_variants_start_from_the_same_weights():
    states = []
    for norm in ("none", "custom", "torch"):
        lightning.seed_everything(5)
        state = LitRegressor(norm=norm).state_dict()
        states.append({key: value for key, value in state.items() if "linear" in key or "output" in key})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["none", "custom", "torch"])
def test_checkpoint_rebuilds_the_same_layers(norm, tmp_path):
    model = LitRegressor(norm=norm, norm_options={"eps": 1e-2}, activation="relu", depth=2, width=5)
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(model, SyntheticRegressionDataModule(num_points=30))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LitRegressor.load_from_checkpoint(tmp_path / "model.ckpt")
    assert repr(loaded) == repr(model)
    x = torch.randn(4, 1)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.filterwarnings("ignore:Evaluation with running statistics that no batch has updated")
def test_what_evaluation_normalises_by(statistics):
    model = LitRegressor(
        norm_options={"convention": "tf_ema", "eps": 1e-3, "momentum": 0.5}, eval_statistics=statistics
    )
    data = SyntheticRegressionDataModule(num_points=50, seed=2)
    data.setup("fit")
    (metrics,) = quiet_trainer().validate(model, data, verbose=False)
    net = model.net.eval()
    with torch.no_grad():
        running = F.mse_loss(net(data.x), data.y).item()
        with batch_statistics(net):
            batch = F.mse_loss(net(data.x), data.y).item()
    assert running != pytest.approx(batch)
    assert metrics["val/loss"] == pytest.approx(running if statistics == "running" else batch, rel=1e-5)
    # Neither touches the running statistics, which still are what they were before any training.
    assert isinstance(net.norm1, BatchNorm1d) and net.norm1.running_var.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is not known: choose one of none, custom, torch"),
        ({"activation": "tan"}, "activation='tan' is not known"),
        ({"depth": 0}, "depth=0 is not possible: give an integer of at least 1"),
        ({"width": -3}, "width=-3 is not possible"),
        ({"weight_std": -1.0}, "weight_std=-1.0 is not possible"),
        ({"learning_rate": 0}, "learning_rate=0 is not possible: give a number above 0"),
        ({"eval_statistics": "moving"}, "eval_statistics='moving' is not known: choose one of running, batch"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LitRegressor(**options)


@pytest.mark.parametrize("norm", ["custom", "torch"])
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 10, "num_points": 2501}])
def test_a_batch_of_one_is_refused_before_training(norm, options):
    with pytest.raises(ValueError, match=rf"batch_size=\d+ is not possible with norm='{norm}': it leaves"):
        quiet_trainer(max_steps=1).fit(LitRegressor(norm=norm), SyntheticRegressionDataModule(**options))


def test_a_batch_of_one_is_fine_without_normalisation():
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(LitRegressor(norm="none"), SyntheticRegressionDataModule(batch_size=1))
    assert trainer.global_step == 2


def test_checkpoints_are_named_by_the_step_they_were_written_at(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = quiet_trainer(max_steps=12, val_check_interval=5, enable_checkpointing=True, callbacks=[checkpoint])
    trainer.fit(LitRegressor(depth=1), SyntheticRegressionDataModule())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step=12.ckpt",
        "step=3.ckpt",
        "step=6.ckpt",
        "step=9.ckpt",
    ]


# The checkpoints of the resumed run go to a directory of their own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_amid_an_epoch_gives_the_same_numbers(tmp_path):
    def losses(name, **options):
        lightning.seed_everything(1)
        checkpoint = ModelCheckpoint(tmp_path / name / "checkpoints", "at_{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path / name, max_epochs=2, val_check_interval=5, enable_checkpointing=True, callbacks=[checkpoint]
        )
        trainer.fit(LitRegressor(depth=2), SyntheticRegressionDataModule(num_points=200), **options)
        events = read_events(tmp_path / name)
        return scalar(events, "train/loss"), scalar(events, "val/loss")

    train, val = losses("whole")
    resumed_train, resumed_val = losses("resumed", ckpt_path=tmp_path / "whole" / "checkpoints" / "at_step=14.ckpt")
    assert list(resumed_train) == list(range(14, 40))
    assert resumed_train == {step: loss for step, loss in train.items() if step >= 14}
    assert resumed_val == {step: loss for step, loss in val.items() if step > 14}
