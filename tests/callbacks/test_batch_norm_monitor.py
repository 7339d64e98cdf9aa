import copy
import math
import os
import pickle
import socket
from datetime import timedelta
from functools import partial

import lightning
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import quiet_trainer, read_events, run_on_ranks, scalar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import BatchNorm1d, BatchNorm2d, BatchNormMonitor, SwapNorm
from bnlightning.monitors.catching.hooks import NoHook
from bnlightning.monitors.counting.norms import NormAccumulators, NormCounts
from bnlightning.nn import BatchNormAct2d

# The loaders have no workers, as they need none, and many tests only train.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
]


class Net(lightning.LightningModule):
    """Any module with batch norm layers in a row."""

    def __init__(self, *layers, lr=0.01):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 48), *layers)
        self.head = nn.Linear(48, 1)
        self.lr = lr

    def forward(self, x):
        return self.head(self.body(x).flatten(1))

    def training_step(self, batch):
        (x,) = batch
        return self(x).square().mean()

    def validation_step(self, batch):
        self.training_step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def every_kind():
    return [
        nn.Unflatten(1, (3, 4, 4)),
        nn.BatchNorm2d(3),
        BatchNorm2d(3, convention="keras"),
        BatchNormAct2d(3, convention="caffe", momentum=0.2),
        BatchNorm2d(48, convention="from_scratch"),
        nn.Flatten(2),
        nn.BatchNorm1d(3, eps=0.1),
        nn.Unflatten(2, (4, 2, 2)),
        nn.BatchNorm3d(3, momentum=None),
        nn.Flatten(1),
        BatchNorm1d(48, convention="tf_ema", momentum=0.3, eps=1e-3),
        nn.BatchNorm1d(48, affine=False),
        nn.BatchNorm1d(48, track_running_stats=False),
        nn.SyncBatchNorm(48),
    ]


def loader(samples=40, batch_size=8, seed=0, scale=1.0):
    x = scale * torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


class Capture(lightning.Callback):
    """What batch norm layers take in, and what they hold before a step, through hooks of its own."""

    def __init__(self):
        self.inputs, self.held = {}, {}

    def on_fit_start(self, trainer, pl_module):
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(partial(self.keep, trainer, name))

    def keep(self, trainer, name, layer, args):
        if not trainer.training or torch._C._current_graph_task_id() != -1:
            return
        key = (trainer.global_step, name)
        self.inputs.setdefault(key, []).append(args[0].detach().double().numpy().copy())
        if key not in self.held:
            self.held[key] = {tensor: value.double().numpy() for tensor, value in layer.state_dict().items()}
            self.held[key] = {tensor: value.copy() for tensor, value in self.held[key].items()}


def channels(layer, x):
    """Values by channel, from an input of any shape."""
    if getattr(getattr(layer, "convention", None), "per_activation", False):
        x = x.reshape(len(x), -1)
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def expected(layer, inputs, held, ranks=None):
    """The numbers of a layer, from the input of every call and its state before, in float64."""
    values = np.concatenate([channels(layer, x) for x in inputs], axis=1)
    convention = getattr(layer, "convention", None)
    ddof = 0 if convention is not None and not convention.unbiased else 1
    mean, var = values.mean(axis=1), values.var(axis=1)
    want = {}
    if "running_mean" in held:
        running_mean, running_var = held["running_mean"], held["running_var"]
        want["min_running_var"] = running_var.min()
        if held["num_batches_tracked"] > 0 or not layer.training:
            want["mean_drift"] = np.max(np.abs(running_mean - mean) / np.sqrt(running_var + layer.eps))
            ratio = (running_var + layer.eps) / (values.var(axis=1, ddof=ddof) + layer.eps)
            want["var_drift"] = np.max(np.abs(np.log(ratio)))
    if "weight" in held:
        want["scale_near_zero"] = np.mean(np.abs(held["weight"]) < 1e-3)
    if ranks is not None:
        means = [np.concatenate([channels(layer, x) for x in own], axis=1).mean(axis=1) for own in ranks]
        want["rank_spread"] = np.max(np.std(means, axis=0) / np.sqrt(var + layer.eps))
    return want


def written(events, name, step):
    """The numbers of a layer at a step."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("norm_") and tag.endswith(f"/{name}")]
    return {
        tag.partition("/")[0].removeprefix("norm_"): scalar(events, tag)[step]
        for tag in tags
        if step in scalar(events, tag)
    }


def assert_as_captured(events, model, capture, steps, **tolerance):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for step in steps:
                want = expected(layer, capture.inputs[step, name], capture.held[step, name])
                got = written(events, name, step)
                assert got == pytest.approx(want, **({"rel": 1e-5, "abs": 1e-6} | tolerance)), (name, step)


def test_writes_what_numpy_makes_of_the_captured_inputs_and_buffers(tmp_path):
    torch.manual_seed(0)
    model, capture = Net(*every_kind()), Capture()
    with torch.no_grad():
        model.body[2].weight[1] = -1e-4
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[BatchNormMonitor(every_n_steps=3), capture])
    trainer.fit(model, loader(), loader(seed=1))
    events = read_events(tmp_path)
    steps = [0, 3, 6, 9]
    assert_as_captured(events, model, capture, steps)
    assert written(events, "body.2", 0)["scale_near_zero"] == pytest.approx(1 / 3)
    assert set(written(events, "body.12", 3)) == {"min_running_var", "mean_drift", "var_drift"}
    assert set(written(events, "body.13", 3)) == {"scale_near_zero"}
    for step in steps:
        layers = [written(events, name, step) for name, _ in model.named_modules()]
        for key, worst in (("mean_drift", max), ("var_drift", max), ("min_running_var", min)):
            values = [layer[key] for layer in layers if key in layer]
            health = scalar(events, f"health/norm_{key}") if f"health/norm_{key}" in events.Tags()["scalars"] else {}
            assert health.get(step) == (worst(values) if values else None)
        near = sum(
            np.sum(np.abs(held["weight"]) < 1e-3)
            for (at, _), held in capture.held.items()
            if at == step and "weight" in held
        )
        scales = 3 + 3 + 3 + 48 + 3 + 3 + 48 + 48 + 48
        assert scalar(events, "health/norm_scale_near_zero")[step] == pytest.approx(near / scales)
        assert scalar(events, "health/norm_nonfinite")[step] == 0
    assert not any("rank_spread" in tag or "norm_nonfinite/" in tag for tag in events.Tags()["scalars"])


def test_the_micro_batches_of_a_step_are_put_together(tmp_path):
    model, capture = Net(*every_kind()), Capture()
    # The last batch of an epoch has five samples.
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=3,
        accumulate_grad_batches=3,
        log_every_n_steps=1,
        callbacks=[BatchNormMonitor(every_n_steps=1), capture],
    )
    trainer.fit(model, loader(samples=29))
    events = read_events(tmp_path)
    assert [len(capture.inputs[step, "body.2"]) for step in range(6)] == [3, 1] * 3
    assert list(scalar(events, "norm_mean_drift/body.2")) == [1, 2, 3, 4, 5]
    assert_as_captured(events, model, capture, range(6))


def test_an_evaluation_between_micro_batches_and_the_sanity_check_stay_apart(tmp_path):
    torch.manual_seed(0)
    model, capture = Net(nn.BatchNorm1d(48)), Capture()
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=4, val_check_interval=2, num_sanity_val_steps=2,
        callbacks=[BatchNormMonitor(every_n_steps=1), capture],
    )  # fmt: skip
    trainer.fit(model, loader(samples=32, batch_size=4), loader(samples=100, seed=1, scale=50.0))
    events = read_events(tmp_path)
    assert_as_captured(events, model, capture, range(2))
    assert not any("val_" in tag for tag in events.Tags()["scalars"])


def test_layers_in_evaluation_mode_are_held_against_their_input(tmp_path):
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.body[1].eval()

    torch.manual_seed(0)
    model, capture = Frozen(nn.BatchNorm1d(48)), Capture()
    nn.init.uniform_(model.body[1].running_mean)
    nn.init.uniform_(model.body[1].running_var)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[BatchNormMonitor(every_n_steps=2), capture])
    trainer.fit(model, loader())
    events = read_events(tmp_path)
    # No batch has been counted, and none will be.
    assert list(scalar(events, "norm_mean_drift/body.1")) == [0, 2, 4]
    assert_as_captured(events, model, capture, [0, 2, 4])


def test_several_calls_of_a_layer_are_put_together(tmp_path):
    class Twice(Net):
        def forward(self, x):
            x = self.body(x)
            return self.head(self.body[1](input=3 * x[:5] + 1) + self.body[1](x).mean())

    model = Twice(nn.BatchNorm1d(48))
    monitor, seen = BatchNormMonitor(every_n_steps=1), []
    model.body[1].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append((args[0] if args else kwargs["input"]).detach().double().numpy()),
        with_kwargs=True,
    )
    held = []
    model.on_train_batch_start = lambda *_: held.append(
        {name: value.double().numpy() for name, value in model.body[1].state_dict().items()}
    )
    quiet_trainer(tmp_path, max_steps=2, callbacks=[monitor]).fit(model, loader())
    assert [len(x) for x in seen] == [8, 5, 8] * 2
    assert written(read_events(tmp_path), "body.1", 1) == pytest.approx(
        expected(model.body[1], seen[3:], held[1]), rel=1e-5
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_counts_once(use_reentrant, tmp_path):
    class Checkpointed(Net):
        def forward(self, x):
            x = self.body[0](x)
            return self.head(checkpoint(self.body[1:], x, use_reentrant=use_reentrant))

    model, capture = Checkpointed(nn.BatchNorm1d(48)), Capture()
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    # Of few values, so that the unbiased variance shows it if they count twice.
    trainer.fit(model, loader(batch_size=3))
    assert model.body[1].num_batches_tracked == 6
    assert_as_captured(read_events(tmp_path), model, capture, range(3))


def test_values_far_from_zero_keep_their_digits(tmp_path):
    model, capture = Net(nn.Unflatten(1, (3, 4, 4)), nn.BatchNorm2d(3, momentum=1.0)), Capture()
    with torch.no_grad():
        model.body[0].weight.normal_(std=0.3)
        model.body[0].bias.fill_(1000.0)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    trainer.fit(model, loader(batch_size=20))
    step = capture.inputs[1, "body.2"]
    assert 500 < step[0].mean() / step[0].std() < 5000
    assert_as_captured(read_events(tmp_path), model, capture, [1], rel=2e-5)


def test_channels_with_nan_or_infinity_are_counted_and_left_out(tmp_path):
    class Broken(Net):
        def training_step(self, batch):
            x = self.body[0](batch[0])
            bad = torch.zeros_like(x)
            if self.global_step == 1:
                bad[3, 0], bad[0, 1], bad[5, 2] = torch.nan, torch.inf, -torch.inf
            if self.global_step == 3:
                bad[:] = torch.nan
            return self.body[1](x + bad).nansum() * 0

    model, capture = Broken(nn.BatchNorm1d(48)), Capture()
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    trainer.fit(model, loader())
    events = read_events(tmp_path)
    assert all(math.isfinite(item.value) for tag in events.Tags()["scalars"] for item in events.Scalars(tag))
    # The input of the second step; from the third on, the running statistics too.
    assert scalar(events, "norm_nonfinite/body.1") == pytest.approx({1: 3 / 48, 2: 3 / 48, 3: 1.0, 4: 1.0})
    assert scalar(events, "health/norm_nonfinite") == pytest.approx({0: 0.0, 1: 3 / 48, 2: 3 / 48, 3: 1.0, 4: 1.0})
    assert list(scalar(events, "norm_mean_drift/body.1")) == [1, 2]
    assert list(scalar(events, "norm_min_running_var/body.1")) == [0, 1, 2, 3]
    for step in (1, 2):
        inputs = [x[:, 3:] for x in capture.inputs[step, "body.1"]]
        held = {name: value[3:] if value.ndim else value for name, value in capture.held[step, "body.1"].items()}
        want = expected(model.body[1], inputs, held)
        got = written(events, "body.1", step)
        for key in ("mean_drift", "var_drift"):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (step, key)


def test_empty_batches_and_layers_that_do_not_run(tmp_path):
    class Empty(Net):
        def training_step(self, batch):
            x = self.body[0](batch[0])
            if self.global_step > 0:
                self.body[1](x[:0])
            return self.body[1](x).mean() if self.global_step != 2 else x.mean()

    model, capture = Empty(nn.BatchNorm1d(48)), Capture()
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    trainer.fit(model, loader())
    events = read_events(tmp_path)
    assert_as_captured(events, model, capture, [1, 3])
    assert set(written(events, "body.1", 2)) == {"min_running_var", "scale_near_zero"}


def test_without_variance_and_without_eps(tmp_path):
    class Frozen(Net):
        def training_step(self, batch):
            with torch.no_grad():
                self.body(batch[0])
            return self.head.weight.sum()

        def on_train_epoch_start(self):
            self.body.eval()

    model, capture = Frozen(nn.BatchNorm1d(48, eps=0.0)), Capture()
    with torch.no_grad():
        model.body[0].weight[7] = 0.0
        model.body[1].running_var[8] = 0.0
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    trainer.fit(model, loader())
    got = written(read_events(tmp_path), "body.1", 0)
    assert got.pop("min_running_var") == 0
    # Their drifts would be infinite.
    others = ~np.isin(np.arange(48), (7, 8))
    held = {name: value[others] if value.ndim else value for name, value in capture.held[0, "body.1"].items()}
    want = expected(model.body[1], [x[:, others] for x in capture.inputs[0, "body.1"]], held)
    want.pop("min_running_var")
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision, tmp_path):
    model, capture = Net(nn.Unflatten(1, (3, 4, 4)), nn.BatchNorm2d(3)), Capture()
    monitor = BatchNormMonitor(every_n_steps=1)
    quiet_trainer(tmp_path, max_steps=3, precision=precision, callbacks=[monitor, capture]).fit(model, loader())
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert model.body[2].running_var.dtype == dtype
    assert_as_captured(read_events(tmp_path), model, capture, range(3))


def test_a_compiled_module_is_one_graph_for_sampled_steps_and_one_for_others(tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend

    # torch.compile stops after eight variants of one function, which other tests may have used up.
    torch._dynamo.reset()
    events = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net(nn.BatchNorm1d(48), nn.ReLU(), BatchNorm1d(48, convention="keras"))
        graphs = CompileCounterWithBackend("aot_eager")
        if compiled:
            model.body.compile(backend=graphs, fullgraph=True)
        directory = tmp_path / str(compiled)
        quiet_trainer(directory, max_epochs=2, callbacks=[BatchNormMonitor(every_n_steps=2)]).fit(model, loader())
        events.append(read_events(directory))
    # Earlier versions also guard on what the hook reads besides.
    assert graphs.frame_count == 2 or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    for step in range(0, 10, 2):
        for name in ("body.1", "body.3"):
            plain, compiled = (written(each, name, step) for each in events)
            assert compiled == pytest.approx(plain, rel=1e-5, abs=1e-7) and len(plain) == (4 if step else 2)


def test_a_module_that_ran_compiled_before_the_fit_is_watched(tmp_path):
    torch._dynamo.reset()
    model = Net(nn.BatchNorm1d(48))
    model.body.compile(backend="eager")
    quiet_trainer(max_steps=1).fit(model, loader())
    quiet_trainer(tmp_path, max_steps=2, callbacks=[BatchNormMonitor(every_n_steps=1)]).fit(model, loader())
    assert {"norm_mean_drift/body.1", "norm_var_drift/body.1"} <= set(read_events(tmp_path).Tags()["scalars"])


def test_warns_once_when_no_layer_is_called_through_its_hooks():
    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(48)

        def forward(self, x):
            return self.norm.forward(x)

    with pytest.warns(UserWarning, match=r"BatchNormMonitor sees no input of body\.1\.norm or any other") as caught:
        quiet_trainer(max_steps=5, callbacks=[BatchNormMonitor(every_n_steps=1)]).fit(Net(Forward()), loader())
    assert sum("BatchNormMonitor" in str(each.message) for each in caught) == 1


def test_lazy_layers_from_the_step_on_at_which_they_have_parameters(tmp_path):
    torch.manual_seed(0)
    model, capture = Net(nn.LazyBatchNorm1d(), nn.BatchNorm1d(48)), Capture()
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[BatchNormMonitor(every_n_steps=1), capture])
    trainer.fit(model, loader())
    events = read_events(tmp_path)
    assert type(model.body[1]) is nn.BatchNorm1d
    assert written(events, "body.1", 0) == {}
    assert_as_captured(events, model, capture, [1, 2])


def test_swapped_layers(tmp_path):
    model, capture = Net(nn.BatchNorm1d(48)), Capture()
    callbacks = [BatchNormMonitor(every_n_steps=1), SwapNorm("custom", convention="flax"), capture]
    quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks).fit(model, loader())
    assert isinstance(model.body[1], BatchNorm1d)
    assert_as_captured(read_events(tmp_path), model, capture, range(2))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, partial(BatchNorm1d, convention="keras")])
def test_training_is_bit_identical_with_and_without(kind, tmp_path):
    states = []
    for callbacks in ([], [BatchNormMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        model = Net(kind(48), nn.Dropout(0.5))
        trainer = quiet_trainer(tmp_path / str(len(callbacks)), max_epochs=2, callbacks=callbacks)
        trainer.fit(model, loader(), loader(seed=1))
        states.append((model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


def test_one_hook_a_layer_that_is_gone_afterwards_also_after_an_exception(tmp_path):
    class Failing(Net):
        def training_step(self, batch):
            assert len(hooks_of(self)) == 2
            # The hooks of a copy observe nothing.
            assert all(isinstance(hook, NoHook) for hook in hooks_of(copy.deepcopy(self)))
            if self.trainer.global_step == 2:
                raise RuntimeError("stop")
            return super().training_step(batch)

    monitor = BatchNormMonitor(every_n_steps=1)
    model = Failing(nn.BatchNorm1d(48), nn.BatchNorm1d(48))
    with pytest.raises(RuntimeError, match="stop"):
        quiet_trainer(tmp_path / "failed", max_epochs=1, callbacks=[monitor]).fit(model, loader())
    assert not hooks_of(model)
    healthy = Net(nn.BatchNorm1d(48))
    quiet_trainer(tmp_path / "healthy", max_epochs=1, callbacks=[monitor]).fit(healthy, loader())
    assert not hooks_of(healthy)
    assert list(scalar(read_events(tmp_path / "healthy"), "norm_mean_drift/body.1")) == [1, 2, 3, 4]
    pickle.loads(pickle.dumps((healthy, monitor)))


def test_a_second_fit_starts_anew(tmp_path):
    monitor, model, events = BatchNormMonitor(every_n_steps=3), Net(nn.BatchNorm1d(48)), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("first", "second"):
        model.load_state_dict(before)
        quiet_trainer(tmp_path / name, max_epochs=1, callbacks=[monitor]).fit(model, loader())
        events.append(read_events(tmp_path / name))
    first, second = ({tag: scalar(each, tag) for tag in each.Tags()["scalars"]} for each in events)
    assert first == second and list(first["norm_min_running_var/body.1"]) == [0, 3]


def test_the_step_is_the_one_of_what_training_logs(tmp_path):
    class Two(Net):
        automatic_optimization = False

        def training_step(self, batch):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss := super().training_step(batch))
                optimizer.step()
            self.log("loss", loss)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    quiet_trainer(tmp_path, max_steps=12, callbacks=[BatchNormMonitor(every_n_steps=4)]).fit(
        Two(nn.BatchNorm1d(48)), loader(samples=80)
    )
    events = read_events(tmp_path)
    # Two steps of optimizers a batch: due at 0, 4 and 8 of them.
    assert list(scalar(events, "loss")) == [0, 1, 2, 3, 4, 5]
    assert list(scalar(events, "norm_min_running_var/body.1")) == [0, 2, 4]


def is_first(name, module):
    return module.num_features == 3 and name.endswith("2")


@pytest.mark.parametrize(
    ("modules", "watched"),
    [
        (None, {"body.2", "body.4", "body.5"}),
        ("body.[25]", {"body.2", "body.5"}),
        (["*.4", "*.5"], {"body.4", "body.5"}),
        (is_first, {"body.2"}),
        ([is_first, "*.5"], {"body.2", "body.5"}),
        (BatchNorm1d, {"body.5"}),
        ("body.*", {"body.2", "body.4", "body.5"}),
    ],
)
def test_chooses_layers(modules, watched, tmp_path):
    layers = nn.Unflatten(1, (3, 4, 4)), nn.BatchNorm2d(3), nn.Flatten(1), nn.BatchNorm1d(48), BatchNorm1d(48)
    instance_norm = nn.InstanceNorm1d(48, affine=True, track_running_stats=True)
    model = Net(*layers, nn.Unflatten(1, (48, 1)), nn.Upsample(2), instance_norm, nn.AvgPool1d(2))
    quiet_trainer(tmp_path, max_steps=1, callbacks=[BatchNormMonitor(modules=modules)]).fit(model, loader())
    tags = read_events(tmp_path).Tags()["scalars"]
    assert {tag.partition("/")[2] for tag in tags if tag.startswith("norm_")} == watched


@pytest.mark.parametrize("modules", [None, "head"])
def test_warns_when_there_is_nothing_to_watch(modules, tmp_path):
    model = Net(nn.BatchNorm1d(48)) if modules else BoringModel()
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[BatchNormMonitor(modules=modules)], limit_val_batches=0)
    with pytest.warns(UserWarning, match="finds nothing to watch in") as caught:
        trainer.fit(model, *([loader()] if modules else []))
    assert sum("BatchNormMonitor" in str(each.message) for each in caught) == 1
    assert not any("norm_" in tag for tag in read_events(tmp_path).Tags()["scalars"])


def test_watches_no_more_than_max_layers(tmp_path):
    model = Net(*(nn.BatchNorm1d(48) for _ in range(4)))
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[BatchNormMonitor(max_layers=2)])
    with pytest.warns(UserWarning, match=r"max_layers=2\) leaves out 2 of 4 batch norm layers from ") as caught:
        trainer.fit(model, loader())
    assert sum("BatchNormMonitor" in str(each.message) for each in caught) == 1
    tags = read_events(tmp_path).Tags()["scalars"]
    assert {tag.partition("/")[2] for tag in tags if tag.startswith("norm_")} == {"body.1", "body.2"}


@pytest.mark.parametrize("modules", [3, [3], [nn.BatchNorm1d(3)], nn.BatchNorm1d(3), [int]])
def test_bad_modules_are_named(modules):
    with pytest.raises(ValueError, match=r"modules=.* is not possible: give types of modules"):
        BatchNormMonitor(modules=modules)


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"max_layers": 0}])
def test_bad_arguments_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not possible: give an integer of at least 1"):
        BatchNormMonitor(**options)


@pytest.mark.parametrize("logger", [False, "csv"])
def test_works_without_tensorboard(logger, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1) if logger else False
    trainer = quiet_trainer(max_steps=1, logger=logger, callbacks=[BatchNormMonitor()])
    trainer.fit(Net(nn.BatchNorm1d(48)), loader())
    assert not logger or "norm_min_running_var/body.1" in (tmp_path / "metrics.csv").read_text()


def test_the_layer_itself_tells_of_input_that_it_refuses(tmp_path):
    model = Net(nn.BatchNorm1d(47))
    with pytest.raises(RuntimeError, match="running_mean should contain 48 elements not 47"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[BatchNormMonitor()]).fit(model, loader())


def _sharded_scales(rank):
    net = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48))
    nn.init.zeros_(net[1].weight[:7])
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    rows = NormAccumulators([net[1]], torch.device("cpu"))
    rows.start()
    rows.reduce()
    return type(net[1].weight).__name__, rows.statistics()


@pytest.mark.slow
def test_sharded_scales_are_put_together(tmp_path):
    for kind, (layer,) in run_on_ranks(_sharded_scales, 2, tmp_path):
        # Nothing has run.
        want = NormCounts(48, 48, False, None, None, None, pytest.approx(7 / 48), 1.0, 0.0)
        assert kind == "DTensor" and layer == want


class OnRanks(Net):
    """On rank 1 one layer does not run; at step 2 a channel of another has a NaN there; no weight ever changes."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Unflatten(1, (3, 4, 4)),
            BatchNorm2d(3, convention="keras", sync=True),
            nn.Flatten(1),
            BatchNorm1d(48, sync=True),
            nn.BatchNorm1d(48),
            lr=0.0,
        )
        self.extra = BatchNorm1d(48, convention="flax")
        self.sick = nn.BatchNorm1d(48)

    def forward(self, x):
        x = self.body(x)
        if self.global_rank == 0:
            x = self.extra(x)
        bad = torch.zeros_like(x)
        if self.global_rank == 1 and self.global_step == 2:
            bad[1, 5] = torch.nan
        self.sick(x.detach() + bad)
        return self.head(x)


# Of each micro-batch the first five samples are rank 0's, the other three rank 1's.
SPLIT = (slice(0, 5), slice(5, 8))


def _fit_on_rank(rank, port, directory):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    x = loader(samples=48).dataset.tensors[0].view(6, 8, 3)[:, SPLIT[rank]]
    capture, model = Capture(), OnRanks()
    trainer = quiet_trainer(
        directory,
        max_epochs=1,
        devices=2,
        accumulate_grad_batches=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=60), find_unused_parameters=True),
        use_distributed_sampler=False,
        callbacks=[BatchNormMonitor(every_n_steps=1), capture],
    )
    calls, reduce = [], torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    trainer.fit(model, DataLoader(TensorDataset(x.reshape(-1, 3)), batch_size=x.shape[1]))
    torch.save({"inputs": capture.inputs, "held": capture.held, "calls": calls}, directory / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_fit_on_rank, (port, directory), nprocs=2)
    return read_events(directory), [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_write_what_numpy_makes_of_the_inputs_of_both(two_ranks):
    events, ranks = two_ranks
    model = OnRanks()
    for name in ("body.2", "body.4", "body.5", "extra", "sick"):
        for step in range(3):
            own = [rank["inputs"][step, name] for rank in ranks if (step, name) in rank["inputs"]]
            held = ranks[0]["held"][step, name]
            layer = model.get_submodule(name)
            if (name, step) == ("sick", 2):
                own = [[np.delete(x, 5, axis=1) for x in inputs] for inputs in own]
                held = {key: np.delete(value, 5) if value.ndim else value for key, value in held.items()}
            want = expected(layer, [x for inputs in own for x in inputs], held, own if len(own) > 1 else None)
            got = written(events, name, step)
            assert got.pop("nonfinite", 0.0) == pytest.approx(1 / 48 if (name, step) == ("sick", 2) else 0.0)
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6), (name, step)
    assert [len(x) for rank in ranks for x in rank["inputs"][1, "body.2"]] == [5, 5, 3, 3]
    spreads = [scalar(events, f"norm_rank_spread/{name}") for name in ("body.2", "body.4", "body.5", "sick")]
    # But for the last, whose input has been normalised on each rank.
    assert all(min(spread.values()) > 0.01 for spread in spreads[:3])
    assert scalar(events, "health/norm_rank_spread") == {
        step: max(spread[step] for spread in spreads) for step in range(3)
    }


@pytest.mark.slow
def test_two_ranks_are_as_one_with_the_whole_batch(two_ranks, tmp_path):
    events, _ = two_ranks
    # Synchronised, the running statistics are the same, too.
    monitor = BatchNormMonitor(every_n_steps=1, modules="body.*")
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[monitor])
    trainer.fit(OnRanks(), loader(samples=48))
    alone = read_events(tmp_path)
    for name in ("body.2", "body.4"):
        for step in range(3):
            got = written(events, name, step)
            assert got.pop("rank_spread") > 0.01
            assert got == pytest.approx(written(alone, name, step), rel=1e-5, abs=1e-6), (name, step)


@pytest.mark.slow
def test_a_publication_is_one_collective(two_ranks):
    for rank in two_ranks[1]:
        # 7 numbers a channel, 2 a layer.
        # 9 numbers a channel, 3 a layer.
        packed = 9 * (3 + 4 * 48) + 3 * 5
        assert rank["calls"].count((packed,)) == 3
        assert [shape for shape in rank["calls"] if len(shape) == 1 and shape[0] > 200] == [(packed,)] * 3


def test_a_copy_of_a_layer_in_the_middle_of_a_fit_brings_nothing_along(tmp_path):
    sizes = []

    class Copying(Net):
        def __init__(self):
            super().__init__(nn.BatchNorm1d(48))
            self.other = nn.Linear(300, 300)

        def training_step(self, batch):
            sizes.append((len(pickle.dumps(self.body)), len(pickle.dumps(self.other))))
            copy.deepcopy(self.body)(batch[0])
            return super().training_step(batch)

    quiet_trainer(max_steps=2, callbacks=[BatchNormMonitor(every_n_steps=1)]).fit(Copying(), loader())
    assert all(mine < 30_000 < others for mine, others in sizes)


def test_a_resumed_fit_keeps_the_cadence(tmp_path):
    steps = []
    for epochs, resumed in ((1, {}), (2, {"ckpt_path": tmp_path / "last.ckpt"})):
        trainer = quiet_trainer(
            tmp_path / str(epochs), max_epochs=epochs, callbacks=[BatchNormMonitor(every_n_steps=4)]
        )
        trainer.fit(Net(nn.BatchNorm1d(48)), loader(), **resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        steps.append(list(scalar(read_events(tmp_path / str(epochs)), "health/norm_min_running_var")))
    assert steps == [[0, 4], [8]]
