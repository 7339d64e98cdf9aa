import errno
import math
import os
import pickle

import pytest
import torch
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from bnlightning import (
    LitClassifier,
    LitMovingAverage,
    LitRegressor,
    MNISTDataModule,
    PointsDataModule,
    PublishedCurve,
    PublishedValues,
    SyntheticRegressionDataModule,
)
from bnlightning.experiments import CheckpointFiles, RunLogger
from bnlightning.experiments.signals import Signals
from bnlightning.experiments.trainer_parts import Progress

from .commands import read_hparams


def events_of(directory):
    (file,) = directory.glob("events*")
    return [event for event in LegacyEventFileLoader(str(file)).Load() if event.summary.value]


def run_logger(directory):
    return RunLogger(directory, name="", version="", default_hp_metric=False)


def test_numbers_logged_together_are_one_event(tmp_path):
    logger = run_logger(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.1), "other": 2}, step=3)
    logger.log_metrics({"train/loss": math.nan}, step=4)
    logger.experiment.flush()
    events = events_of(tmp_path)
    assert [(event.step, [value.tag for value in event.summary.value]) for event in events] == [
        (3, ["train/loss", "other"]),
        (4, ["train/loss"]),
    ]
    written = scalar(read_events(tmp_path), "train/loss")
    assert written[3] == torch.tensor(0.1).item() and math.isnan(written[4])


def test_only_the_first_event_of_a_tag_has_its_description(tmp_path):
    logger = run_logger(tmp_path)
    for step in range(2):
        logger.log_metrics({"val/acc": 0.5, "test/acc": 0.5, "test/scale": 1.0, "published/val/acc": 1.0}, step)
        logger.log_metrics({"my/own": 0.5, "val/f1": 0.5}, step)
    logger.experiment.flush()
    described = [
        {value.tag: value.metadata.summary_description for value in event.summary.value if value.HasField("metadata")}
        for event in events_of(tmp_path)
    ]
    assert [list(tags) for tags in described] == [
        ["val/acc", "test/acc", "test/scale", "published/val/acc"],
        [],
        [],
        [],
    ]
    first = described[0]
    assert first["val/acc"].startswith("The share of right answers over the whole validation set")
    # A tag's own words, not those of all tests.
    assert first["test/acc"] != first["test/scale"] and "no result of this run" in first["published/val/acc"]


def test_tensorboard_gets_the_descriptions(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    logger = run_logger(tmp_path)
    for step in range(3):
        logger.log_metrics({"val/loss": 0.5}, step)
    logger.experiment.flush()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    metadata = multiplexer.SummaryMetadata(".", "val/loss")
    assert metadata.summary_description.startswith("The loss over the whole validation set")
    assert metadata.plugin_data.plugin_name == "scalars" and len(multiplexer.Tensors(".", "val/loss")) == 3
    # The reader in Rust, which is TensorBoard's default, drops the description otherwise.
    (value,) = events_of(tmp_path)[0].summary.value
    assert value.metadata.data_class == type(value.metadata)(data_class="DATA_CLASS_SCALAR").data_class


@pytest.mark.parametrize("kind", ["regressor", "classifier", "moving average"])
def test_every_number_of_our_modules_has_a_description(kind, tiny_mnist, tmp_path):
    if kind == "regressor":
        model, data = LitRegressor(depth=1), SyntheticRegressionDataModule(num_points=40)
        callbacks = [PublishedCurve("val/loss", [1.0], every_n_steps=1)]
    elif kind == "classifier":
        model = LitClassifier(width=10, depth=1)
        data = MNISTDataModule(data_dir=str(tiny_mnist), num_val=100, batch_size=50)
        callbacks = [PublishedValues({"acc": 0.5})]
    else:
        model, data = LitMovingAverage(), PointsDataModule([[0.0], [1.0]], [[3.0], [4.0]])
        callbacks = [PublishedValues({"running_mean": 0.5})]
    logger = run_logger(tmp_path)
    trainer = quiet_trainer(logger=logger, max_steps=2, callbacks=callbacks)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    if kind != "regressor":
        trainer.test(model, data, verbose=False)
    tags = set(read_events(tmp_path).Tags()["scalars"])
    described = {v.tag for event in events_of(tmp_path) for v in event.summary.value if v.metadata.summary_description}
    assert tags == described and {"train/loss", "val/loss"} < tags and "epoch" not in tags


def test_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^val/loss='low' cannot be logged: log a number"):
        run_logger(tmp_path).log_metrics({"val/loss": "low"}, 0)


def test_several_curves_in_one_chart_are_written_as_lightning_writes_them(tmp_path):
    logger = run_logger(tmp_path)
    logger.log_metrics({"both": {"a": 1.0, "b": 2.0}, "val/loss": 3.0}, 1)
    logger.experiment.flush()
    assert scalar(read_events(tmp_path), "val/loss") == {1: 3.0}
    assert scalar(read_events(tmp_path / "both_a"), "both") == {1: 1.0}


def test_the_outcome_is_what_tensorboard_lists(tmp_path):
    for name, loss in (("good", 0.25), ("diverged", math.nan)):
        logger = run_logger(tmp_path / name)
        logger.log_metrics({"val/loss": 4.0, "train/loss": 7.0}, 0)
        logger.log_metrics({"val/loss": loss, "val/acc": 0.5}, 10)
        logger.log_metrics({"test/acc": 0.125, "published/acc": 0.2}, 10)
        given = {
            "model.norm": name,
            "model.learning_rate": 0.01,
            "model.width": [3, 4],
            "num_threads": None,
            "shuffle": True,
        }
        logger.log_outcome(given)
    listed = read_hparams(tmp_path)
    assert list(listed) == ["diverged", "good"]
    values = {
        "model.norm": "good",
        "model.learning_rate": 0.01,
        "model.width": "[3, 4]",
        "num_threads": "null",
        "shuffle": "true",
    }
    assert listed["good"] == (values, {"val/loss": 0.25, "val/acc": 0.5, "test/acc": 0.125})
    assert math.isnan(listed["diverged"][1]["val/loss"]) and listed["diverged"][1]["test/acc"] == 0.125
    # Nothing else comes of it: no runs, no numbers.
    assert sorted(path.name for path in (tmp_path / "good").iterdir())[0].startswith("events.out")
    assert len(list(tmp_path.rglob("events*"))) == 2
    assert read_events(tmp_path / "good").Tags()["scalars"] == [
        "val/loss", "train/loss", "val/acc", "test/acc", "published/acc",
    ]  # fmt: skip


def test_the_file_stays_open_over_fit_and_test(tmp_path):
    logger = run_logger(tmp_path)
    logger.log_metrics({"val/loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"val/loss": 2.0}, 1)
    logger.finalize("success")
    assert scalar(read_events(tmp_path), "val/loss") == {0: 1.0, 1: 2.0}
    assert len(list(tmp_path.glob("events*"))) == 1 and (tmp_path / "hparams.yaml").is_file()


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1}, path)

    def fail(self, checkpoint, path, storage_options=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", fail)
    with pytest.raises(OSError, match="full"):
        CheckpointFiles().save_checkpoint({"step": 2}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"] and torch.load(path, weights_only=True) == {"step": 1}


def test_progress_tells_how_far_a_run_has_come_and_hears_what_was_lost(tmp_path):
    signals = Signals()
    progress = Progress(signals)
    assert not progress.has_begun and progress.evaluated_at is None
    trainer = quiet_trainer(max_steps=3, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[progress])
    trainer.fit(LitRegressor(depth=1), SyntheticRegressionDataModule(num_points=100))
    assert progress.has_begun and progress.evaluated_at == 2
    signals.interrupted = True
    for hook in (
        progress.on_train_batch_start,
        progress.on_validation_batch_start,
        progress.on_test_batch_start,
    ):
        with pytest.raises(KeyboardInterrupt):
            hook()


def test_a_checkpoint_is_read_as_data_unless_it_is_trusted(tmp_path):
    torch.save({"global_step": 3, "path": tmp_path}, tmp_path / "theirs.ckpt")
    # Whatever Lightning asks for.
    for asked in (None, True, False):
        with pytest.raises(pickle.UnpicklingError):
            CheckpointFiles().load_checkpoint(tmp_path / "theirs.ckpt", weights_only=asked)
    assert CheckpointFiles(trusted=True).load_checkpoint(tmp_path / "theirs.ckpt")["path"] == tmp_path
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CheckpointFiles().load_checkpoint(tmp_path / "nowhere")
