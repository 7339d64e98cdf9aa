"""What the monitors' callbacks share: what they tell, what a checkpoint keeps, and how several of them get along."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from helpers import MemoryLogger, quiet_trainer, read_events, run_on_lightning_ranks, scalar
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import (
    ActivationMonitor,
    BatchNormMonitor,
    GradientMonitor,
    PredictionMonitor,
    PreemptionCheckpoint,
    PublishedCurve,
    SwapNorm,
)
from bnlightning.callbacks._monitor import MonitorCallback
from bnlightning.monitors.counting.layer_statistics import layer_catalogue
from bnlightning.monitors.record import Entry, Record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
]


class Watching(MonitorCallback):
    """The least that a monitor's callback is."""

    max_layers = 2

    def on_train_start(self, trainer, pl_module):
        self._tell(trainer, Record(3, layers={"net": Entry({"dead": 0.5})}, health={"dead": 0.5}))

    def on_train_end(self, trainer, pl_module):
        self._tell(trainer, None)

    def on_fit_start(self, trainer, pl_module):
        self._warn_of_nothing("modules", "net.*", pl_module, "choose others.")
        self._warn_of_left_out("max_layers", 2, ["c", "d", "e"], "layers", "others by `modules`.")


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_rank_tells_the_loggers_and_no_other(is_first):
    logger = MemoryLogger()
    callback = Watching(10, [layer_catalogue()])
    trainer = SimpleNamespace(is_global_zero=is_first, loggers=[logger], callbacks=[callback], lr_scheduler_configs=[])
    callback.on_train_start(trainer, None)
    callback.on_train_end(trainer, None)
    assert logger.scalars == ({("layer_dead/net", 3): 0.5, ("health/dead", 3): 0.5} if is_first else {})


def test_what_is_not_watched_is_told_by_argument_number_and_cure():
    with pytest.warns(UserWarning) as caught:
        Watching(10, []).on_fit_start(None, SimpleNamespace())
    nothing, left_out = (str(warning.message) for warning in caught)
    assert nothing == "Watching(modules='net.*') finds nothing to watch in SimpleNamespace: choose others."
    assert left_out == (
        "Watching(max_layers=2) leaves out 3 of 5 layers from c on: raise max_layers, or choose others by `modules`."
    )


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5, True])
def test_a_distance_that_is_none_is_refused(every_n_steps):
    with pytest.raises(ValueError, match=f"every_n_steps={every_n_steps} is not possible"):
        Watching(every_n_steps, [])


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.net(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.head(self.net(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(batches=8):
    x = torch.randn(4 * batches, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=4)


class Raw(Net):
    """Optimizers that Lightning does not see: one of its own, two of them, or gradients accumulated by hand."""

    automatic_optimization = False

    def __init__(self, optimizers=1, every=1, closure=False):
        super().__init__()
        self.number, self.every, self.closure = optimizers, every, closure

    def training_step(self, batch, batch_idx):
        def loss():
            value = super(Raw, self).training_step(batch, batch_idx) / self.every
            self.manual_backward(value)
            return value

        found = self.optimizers(use_pl_optimizer=False)
        if not self.closure:
            loss()
        if (batch_idx + 1) % self.every == 0:
            for optimizer in found if isinstance(found, list) else [found]:
                optimizer.step(loss) if self.closure else optimizer.step()
            self.zero_grad()

    def configure_optimizers(self):
        parts = [self.net, self.head] if self.number == 2 else [self]
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]


def monitors(every=1):
    return [ActivationMonitor(every), GradientMonitor(every), BatchNormMonitor(every)]


SAMPLED = ("layer_mean/net.2", "health/grad_norm", "norm_mean_drift/net.1")


@pytest.mark.parametrize(
    ("options", "every", "steps"),
    [
        ({}, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({}, 3, [0, 3, 6]),
        ({"optimizers": 2}, 4, [0, 2, 4, 6]),
        ({"every": 4}, 1, [0, 4]),
        ({"closure": True}, 3, [0, 3, 6]),
    ],
)
def test_raw_optimizers_are_sampled_like_others(options, every, steps, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors(every))
    trainer.fit(Raw(**options), loader(), loader(1))
    events = read_events(tmp_path)
    found = {tag: list(scalar(events, tag)) for tag in SAMPLED}
    # Gradients stand at the batch in which they are stepped with.
    behind = [step + options.get("every", 1) - 1 for step in steps]
    # Before the first update there is nothing that has drifted.
    assert found == {SAMPLED[0]: steps, SAMPLED[1]: behind, SAMPLED[2]: steps[1:]}
    assert list(scalar(events, "layer_val_mean/net.2")) == [8]


def test_raw_optimizers_give_the_numbers_of_lightning_s(tmp_path):
    for name, model in (("raw", Raw()), ("own", Net())):
        quiet_trainer(tmp_path / name, max_epochs=1, callbacks=monitors()).fit(model, loader())
    raw, own = read_events(tmp_path / "raw"), read_events(tmp_path / "own")
    assert raw.Tags()["scalars"] == own.Tags()["scalars"]
    for tag in own.Tags()["scalars"]:
        assert scalar(raw, tag) == scalar(own, tag), tag


def test_a_resumed_fit_with_raw_optimizers_keeps_the_cadence(tmp_path):
    trainer = quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=monitors(5))
    trainer.fit(Raw(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = quiet_trainer(tmp_path / "second", max_epochs=2, callbacks=monitors(5))
    trainer.fit(Raw(), loader(), ckpt_path=tmp_path / "last.ckpt")
    events = read_events(tmp_path / "second")
    assert {tag: list(scalar(events, tag)) for tag in SAMPLED} == {tag: [10, 15] for tag in SAMPLED}


def test_raw_optimizers_get_a_checkpoint_and_published_values(tmp_path):
    saved = []

    class Requested(PreemptionCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            self._requested = True
            super().on_train_batch_end(trainer, *args)
            saved.append(self._stops)

    checkpoint = Requested(tmp_path / "stopped.ckpt")
    callbacks = [checkpoint, PublishedCurve("train/loss", [0.5], 1)]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(Raw(), loader())
    assert saved == [True] and checkpoint.path.exists()
    assert list(scalar(read_events(tmp_path), "published/train/loss")) == [1]


PAIRS = {
    "ActivationMonitor": lambda: [ActivationMonitor(1, modules="net.2"), ActivationMonitor(4, modules="net.4")],
    "GradientMonitor": lambda: [GradientMonitor(1, "*.weight"), GradientMonitor(4, "*.bias")],
    "BatchNormMonitor": lambda: [BatchNormMonitor(1, modules="net.1"), BatchNormMonitor(4, modules="net.1*")],
    "functions": lambda: [
        ActivationMonitor(1, modules=lambda path, module: path == "net.2"),
        ActivationMonitor(4, modules=lambda path, module: path == "net.4"),
    ],
    "PredictionMonitor": lambda: [PredictionMonitor(1), PredictionMonitor(2)],
    "SwapNorm": lambda: [SwapNorm("custom"), SwapNorm("torch", strict=False)],
}


@pytest.mark.filterwarnings("ignore:.*that one before it has:UserWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_two_of_a_class_with_other_arguments_are_allowed_and_restored(name, tmp_path):
    first = PAIRS[name]()
    trainer = quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=first)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = PAIRS[name]()
    again = quiet_trainer(tmp_path / "second", max_epochs=1, callbacks=second)
    again.fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
    for before, after in zip(first, second, strict=True):
        assert before.state_key == after.state_key
        assert before.state_dict().keys() == after.state_dict().keys()
        if isinstance(before, MonitorCallback):
            assert after.state_dict()["schedule"] == before.state_dict()["schedule"]
    assert first[0].state_key != first[1].state_key or not first[0].state_dict()


def test_twins_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ActivationMonitor`"):
        quiet_trainer(callbacks=[ActivationMonitor(5, "net.*"), ActivationMonitor(5, ["net.*"])])


def test_each_of_two_writes_its_own_tags(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=8, callbacks=PAIRS["ActivationMonitor"]())
    trainer.fit(Net(), loader(), loader(1))
    events = read_events(tmp_path)
    tags = events.Tags()
    assert list(scalar(events, "layer_mean/net.4")) == list(scalar(events, "health/nonfinite#1")) == [0, 4]
    assert list(scalar(events, "layer_mean/net.2")) == list(scalar(events, "health/nonfinite")) == [*range(8)]
    assert {"health/val_nonfinite", "health/val_nonfinite#1"} <= set(tags["scalars"])
    assert {"health/watched/text_summary", "health/watched#1/text_summary"} <= set(tags["tensors"])
    assert {"health/values_by_step", "health/values_by_step#1"} <= set(tags["images"])


def test_what_two_have_is_written_once_and_told(tmp_path):
    callbacks = [ActivationMonitor(1, "net.2"), ActivationMonitor(4)]
    with pytest.warns(UserWarning, match=r"ActivationMonitor number 2 .* has \d+ tag\(s\) that one before") as told:
        quiet_trainer(tmp_path, max_steps=8, callbacks=callbacks).fit(Net(), loader())
    assert len([one for one in told if "that one before" in str(one.message)]) == 1
    events = read_events(tmp_path)
    assert [item.step for item in events.Scalars("layer_mean/net.2")] == [*range(8)]
    assert [item.step for item in events.Histograms("layer_hist/net.2")] == [*range(8)]
    assert list(scalar(events, "layer_mean/net.4")) == [0, 4]


def test_two_find_a_nonfinite_value_once(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] * float("nan")], batch_idx)

    with pytest.warns(UserWarning, match=r"ActivationMonitor: at step 0 .* in the input of net\.0 \(Linear\)"):
        callbacks = [ActivationMonitor(1, "net.2"), ActivationMonitor(2, "net.4")]
        trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks)
        trainer.fit(Broken(), loader())
    events = read_events(tmp_path)
    assert len(events.Tensors("health/first_nonfinite_layer/text_summary")) == 1
    assert "health/first_nonfinite_layer#1/text_summary" not in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore:.*that one before it has:UserWarning")
def test_a_checkpoint_holds_plain_values_and_tensors(tmp_path):
    callbacks = [*monitors(2), ActivationMonitor(2, "net.2", output_gradients=True, effective_rank=True)]
    callbacks += [PredictionMonitor(), SwapNorm("custom", convention="keras"), PublishedCurve("val/acc", [0.5], 2)]

    class Predicting(Net):
        def validation_step(self, batch, batch_idx):
            return {"prediction": self.head(self.net(batch[0]))}

    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks)
    trainer.fit(Predicting(), data, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {callback.state_key for callback in callbacks if callback.state_dict()} == set(states)


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (ActivationMonitor, ["schedule"]),
        (ActivationMonitor, ["history"]),
        (ActivationMonitor, ["uncounted", "health"]),
        (GradientMonitor, ["monitor"]),
        (BatchNormMonitor, ["schedule"]),
    ],
)
def test_a_state_of_another_version_starts_afresh_with_a_warning(make, lost, tmp_path):
    trainer = quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=[make(2)])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    for name in lost:
        del state[name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    trainer = quiet_trainer(tmp_path / "second", max_epochs=2, callbacks=[make(2)])
    with pytest.warns(UserWarning, match=rf"{make.__name__} cannot read its state.*{lost[0]}.*starts afresh"):
        trainer.fit(Net(), loader(), ckpt_path=tmp_path / "old.ckpt")
    assert trainer.global_step == 16 and read_events(tmp_path / "second").Tags()["scalars"]


def test_a_state_under_the_name_of_the_class_alone_starts_afresh_with_a_warning(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(2)])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    checkpoint["callbacks"] = {"ActivationMonitor": state}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    trainer = quiet_trainer(max_epochs=2, callbacks=[ActivationMonitor(2)])
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer.fit(Net(), loader(), ckpt_path=tmp_path / "old.ckpt")


class Seen(lightning.Callback):
    """The numbers of the whole network as another callback sees them, wherever it stands among the callbacks."""

    def __init__(self):
        self.training, self.evaluations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.training.append({tag: value.item() for tag, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, pl_module):
        self.evaluations.append({tag: value.item() for tag, value in trainer.callback_metrics.items()})


def test_other_callbacks_see_the_numbers_that_are_written_and_loggers_get_them_once(tmp_path):
    seen = Seen()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[*monitors(2), seen])
    trainer.fit(Net(), loader(), loader(1))
    events = read_events(tmp_path)
    for tag in ("health/nonfinite", "health/dead", "health/grad_norm", "health/norm_min_running_var"):
        values = scalar(events, tag)
        assert [one[tag] for one in seen.training] == pytest.approx([values[step - step % 2] for step in range(16)])
        assert [item.step for item in events.Scalars(tag)] == [*range(0, 16, 2)]
    assert [one["health/val_dead"] for one in seen.evaluations] == list(scalar(events, "health/val_dead").values())
    assert not any(tag.startswith("layer_") for tag in trainer.callback_metrics)
    assert not any(tag.startswith("health/") for tag in trainer.progress_bar_metrics)


@pytest.mark.parametrize("tag", ["health/dead", "health/val_dead", "health/grad_norm", "health/norm_min_running_var"])
@pytest.mark.parametrize("options", [{}, {"check_on_train_epoch_end": False}])
def test_early_stopping_and_checkpoints_monitor_the_network_s_health(tag, options, tmp_path):
    stopping = EarlyStopping(tag, patience=1, min_delta=1e9, **options)
    saving = ModelCheckpoint(tmp_path / "best", monitor=tag, save_top_k=1)
    # Before the monitors in the list.
    callbacks = [stopping, saving, *monitors(2)]
    trainer = quiet_trainer(tmp_path, max_epochs=8, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Net(), loader(), loader(1))
    assert trainer.current_epoch == 2 and saving.best_model_score is not None
    # The first evaluation behind a resume is not due.
    callbacks = [
        EarlyStopping(tag, patience=9, **options),
        ActivationMonitor(100),
        GradientMonitor(100),
        BatchNormMonitor(100),
    ]
    first = quiet_trainer(max_epochs=1, callbacks=callbacks)
    first.fit(Net(), loader(), loader(1))
    first.save_checkpoint(tmp_path / "first.ckpt")
    callbacks = [
        EarlyStopping(tag, patience=9, **options),
        ActivationMonitor(100),
        GradientMonitor(100),
        BatchNormMonitor(100),
    ]
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(Net(), loader(), loader(1), ckpt_path=tmp_path / "first.ckpt")


@pytest.mark.parametrize("tag", ["layer_mean/net.2", "layer_val_dead/net.2", "param_grad_norm/head.weight"])
def test_a_number_of_a_layer_is_there_for_who_monitors_it(tag, tmp_path):
    stopping = EarlyStopping(tag, patience=1, min_delta=1e9)
    trainer = quiet_trainer(tmp_path, max_epochs=8, callbacks=[stopping, *monitors(2)])
    trainer.fit(Net(), loader(), loader(1))
    assert trainer.current_epoch == 2 and tag in trainer.callback_metrics


def _seen_on_rank(rank, directory):
    seen = Seen()
    stopping = EarlyStopping("health/val_dead", patience=1, min_delta=1e9)
    layer = EarlyStopping("layer_mean/net.2", patience=50)
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "max_epochs": 4}
    callbacks = [stopping, layer, *monitors(2), seen]
    quiet_trainer(directory, callbacks=callbacks, **options).fit(Net(), loader(), loader(4))
    return seen.training, seen.evaluations


@pytest.mark.slow
def test_the_numbers_are_the_same_on_all_ranks(tmp_path):
    one, other = run_on_lightning_ranks(_seen_on_rank, 2, tmp_path, tmp_path / "events")
    assert one == other and len(one[1]) == 2
    assert {"health/dead", "health/grad_norm", "health/norm_mean_drift", "layer_mean/net.2"} <= one[0][-1].keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActivationMonitor(1),
        lambda: GradientMonitor(1),
        lambda: BatchNormMonitor(1),
        lambda: PredictionMonitor(1),
    ],
)
def test_an_error_is_no_hang(make, monkeypatch):
    """A rank that fails communicates no more: the others may be anywhere."""
    callback = make()

    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                dist = torch.distributed
                monkeypatch.setattr(dist, "is_initialized", lambda: True)
                monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
                for name in ("all_reduce", "all_gather", "broadcast_object_list", "all_gather_object", "barrier"):
                    monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a failed rank communicates"))
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Failing(), loader(), loader(1))
    callback.teardown(trainer, None, "fit")
