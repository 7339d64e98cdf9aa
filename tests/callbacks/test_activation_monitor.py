import copy
import dataclasses
import pickle
import re
from unittest.mock import patch

import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import ActivationMonitor, LitRegressor, SyntheticRegressionDataModule, tap
from bnlightning.monitors.catching.finite_check import make_check
from bnlightning.monitors.counting.layers import Sum
from bnlightning.monitors.statistic import Look, Statistic


class Net(lightning.LightningModule):
    """A user's module: two activations, one of them used as a function, and a normalisation."""

    def __init__(self, act=nn.Tanh):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), act(), nn.Linear(8, 6), nn.ReLU())
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(torch.sigmoid(self.body(x)))

    def training_step(self, batch):
        (x,) = batch
        return self(x).square().mean()

    def validation_step(self, batch):
        self.training_step(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(samples=40, batch_size=8, seed=0):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


# The loaders have no workers, as they need none, and many tests only train.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
]


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    last: torch.Tensor


class Capture(lightning.Callback):
    """Keeps what modules put out, by the step and the phase, through hooks of its own."""

    def __init__(self, *names):
        self.names, self.outputs = names, {}

    def setup(self, trainer, pl_module, stage):
        for name in self.names:

            def keep(module, args, output, name=name):
                phase = "train" if trainer.training else trainer.state.stage.value
                self.outputs.setdefault((phase, trainer.global_step, name), []).append(output.detach().clone())

            pl_module.get_submodule(name).register_forward_hook(keep)


def test_logs_what_numpy_makes_of_the_captured_outputs(tmp_path):
    capture = Capture("body.1", "body.2", "body.4")
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ActivationMonitor(every_n_steps=4), capture])
    torch.manual_seed(0)
    trainer.fit(Net(), loader(), loader(seed=1))
    events = read_events(tmp_path)
    # Ten training steps of two epochs, and an evaluation after each.
    for prefix, phase, steps in (("", "train", [0, 4, 8]), ("val_", "validate", [5, 10])):
        for name in capture.names:
            assert list(scalar(events, f"layer_{prefix}mean/{name}")) == steps
            for step in steps:
                values = torch.cat(capture.outputs[phase, step, name]).double().numpy()
                expected = {
                    "mean": values.mean(),
                    "std": values.std(),
                    "zero": (values == 0).mean(),
                    "min": values.min(),
                    "max": values.max(),
                    "nonfinite": 0.0,
                }
                if name == "body.2":
                    expected["saturated"] = (np.abs(values) > 0.99).mean()
                    expected["saturated_low"] = (values < -0.99).mean()
                    expected["saturated_high"] = (values > 0.99).mean()
                if name != "body.1":
                    # The window of 1000 samples is not full yet. No unit is called dead after so few samples.
                    recent = values if prefix else np.concatenate(
                        [torch.cat(capture.outputs[phase, s, name]).double().numpy() for s in steps if s <= step]
                    )  # fmt: skip
                    magnitude = np.abs(recent).mean(axis=0)
                    expected["dead"] = 0.0
                    expected["dormant"] = (magnitude <= 0.025 * magnitude.mean()).mean()
                    expected["rarely_active"] = ((recent != 0).mean(axis=0) < 0.01).mean()
                    if name == "body.2":
                        expected["saturated_units"] = ((np.abs(recent) > 0.99).mean(axis=0) >= 0.95).mean()
                for key, want in expected.items():
                    got = scalar(events, f"layer_{prefix}{key}/{name}")[step]
                    assert got == pytest.approx(want, rel=1e-5, abs=1e-6), (prefix, name, step, key)
                histogram = next(h for h in events.Histograms(f"layer_{prefix}hist/{name}") if h.step == step)
                assert sum(histogram.histogram_value.bucket) == histogram.histogram_value.num == values.size
                assert histogram.histogram_value.min == pytest.approx(values.min())
                assert histogram.histogram_value.max == pytest.approx(values.max())
                assert histogram.histogram_value.sum == pytest.approx(values.sum(), rel=1e-6, abs=1e-6)
                assert histogram.histogram_value.sum_squares == pytest.approx((values**2).sum(), rel=1e-6)
    assert "layer_saturated/body.4" not in events.Tags()["scalars"]
    assert not any("head" in tag or "body.0" in tag for tag in events.Tags()["histograms"])


def test_training_is_bit_identical_with_and_without(tmp_path):
    states = []
    for callbacks in ([], [ActivationMonitor(every_n_steps=1, check_finite_every_n_steps=1)]):
        torch.manual_seed(0)
        model = Net()
        model.body.append(nn.Dropout(0.5))
        trainer = quiet_trainer(tmp_path / str(len(callbacks)), max_epochs=2, callbacks=callbacks)
        trainer.fit(model, loader(), loader(seed=1))
        states.append((model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("monitor", ["ActivationMonitor", "none"])
def test_hooks_are_gone_afterwards_also_after_an_exception(monitor, tmp_path):
    class Failing(Net):
        def training_step(self, batch):
            loss = super().training_step(batch)
            if self.trainer.global_step == 2:
                assert any(module._forward_hooks for module in self.modules()) is (monitor != "none")
                raise RuntimeError("stop")
            return loss

    callbacks = [ActivationMonitor()] if monitor != "none" else []
    model = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(model, loader())
    assert not any(module._forward_hooks for module in model.modules())
    healthy = Net()
    quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(healthy, loader())
    assert not any(module._forward_hooks for module in healthy.modules())
    pickle.loads(pickle.dumps((healthy, callbacks)))


def test_gradient_accumulation_puts_the_micro_batches_of_a_step_together(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory, options, batch_size in ((whole, {}, 8), (parts, {"accumulate_grad_batches": 4}, 2)):
        torch.manual_seed(0)
        model = Net()
        model.body[1] = nn.Identity()
        trainer = quiet_trainer(directory, max_epochs=1, callbacks=[ActivationMonitor(every_n_steps=2)], **options)
        trainer.fit(model, loader(batch_size=batch_size))
    events = [read_events(directory) for directory in (whole, parts)]
    tags = [tag for tag in events[0].Tags()["scalars"] if tag.startswith("layer_")]
    assert tags
    for tag in tags:
        first, second = (scalar(each, tag) for each in events)
        assert list(first) == list(second) == [0, 2, 4]
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4, abs=1e-5)


def test_the_sanity_check_is_not_recorded_and_a_test_run_is(tmp_path):
    monitor = ActivationMonitor(every_n_steps=1)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[monitor], num_sanity_val_steps=2, val_check_interval=2)
    model = Net()
    trainer.fit(model, loader(), loader())
    trainer.test(model, loader(), verbose=False)
    events = read_events(tmp_path)
    assert list(scalar(events, "layer_val_std/body.2")) == [2]
    assert list(scalar(events, "layer_test_std/body.2")) == [2]


def test_evaluations_within_every_n_steps_are_left_out_but_the_last(tmp_path):
    trainer = quiet_trainer(
        tmp_path, max_steps=12, val_check_interval=2, callbacks=[ActivationMonitor(every_n_steps=5)]
    )
    trainer.fit(Net(), loader(samples=200), loader())
    assert list(scalar(read_events(tmp_path), "layer_val_std/body.2")) == [2, 8, 12]


class Diverging(Net):
    """Overflows in body.3 at a given step."""

    bad_step = 2

    def training_step(self, batch):
        if self.global_step == self.bad_step:
            with torch.no_grad():
                self.body[3].weight.sign_().mul_(3e38)
        return super().training_step(batch)


@pytest.mark.parametrize("check", [{}, {"check_finite_every_n_steps": 2}])
def test_names_the_layer_and_step_of_the_first_nonfinite_output(tmp_path, check):
    monitor = ActivationMonitor(every_n_steps=4, **check)
    with pytest.warns(
        UserWarning,
        match=r"at step 2 the first NaN or infinity is in the output of body\.3 \(Linear\); training goes on",
    ):
        quiet_trainer(tmp_path, max_epochs=2, callbacks=[monitor]).fit(Diverging(), loader())
    events = read_events(tmp_path)
    (found,) = events.Tensors("health/first_nonfinite_layer/text_summary")
    assert found.step == 2 and found.tensor_proto.string_val[0].decode() == "body.3"
    assert scalar(events, "layer_nonfinite/body.4")[4] == 1.0
    assert scalar(events, "layer_dead/body.4")[4] == 0.0
    assert scalar(events, "health/nonfinite")[8] == 1.0


def test_an_operation_that_is_no_module_is_blamed_on_the_place(tmp_path):
    class Log(Net):
        def forward(self, x):
            return self.body[4](torch.log(self.body[3](self.body[:3](x))))

    monitor = ActivationMonitor(every_n_steps=4)
    with pytest.warns(
        UserWarning, match=r"in the loss, made by an operation behind body\.3 \(Linear\); training goes on"
    ):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Log(), loader())
    (found,) = read_events(tmp_path).Tensors("health/first_nonfinite_layer/text_summary")
    assert found.step == 0 and found.tensor_proto.string_val[0].decode() == "after body.3"


def test_the_finding_is_written_when_training_fails(tmp_path):
    class Stopping(Diverging):
        def training_step(self, batch):
            loss = super().training_step(batch)
            if not loss.isfinite():
                raise RuntimeError("stop")
            return loss

    with pytest.raises(RuntimeError, match="stop"), pytest.warns(UserWarning, match=r"in the output of body\.3"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor()]).fit(Stopping(), loader())
    (found,) = read_events(tmp_path).Tensors("health/first_nonfinite_layer/text_summary")
    assert found.step == 2 and found.tensor_proto.string_val[0].decode() == "body.3"


def test_a_module_used_twice_with_other_widths(tmp_path):
    class Twice(Net):
        def forward(self, x):
            return self.head(self.body[4](self.body[3](self.body[4](self.body[0](x)))))

    model = Twice()
    with torch.no_grad():
        for layer, dead in ((model.body[0], 2), (model.body[3], 3)):
            layer.weight.zero_()
            layer.bias.fill_(1.0)
            layer.bias[:dead] = -1.0
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(modules="body.4")])
    trainer.fit(model, loader(samples=460, batch_size=460))
    events = read_events(tmp_path)
    for tag, dead, units in (("body.4", 2, 8), ("body.4#1", 3, 6)):
        assert scalar(events, f"layer_dead/{tag}")[0] == pytest.approx(dead / units)
        assert sum(events.Histograms(f"layer_hist/{tag}")[0].histogram_value.bucket) == 460 * units
    assert scalar(events, "health/dead")[0] == pytest.approx(5 / 14)


def test_an_evaluation_amid_accumulated_gradients_stays_apart(tmp_path):
    capture = Capture("body.2")
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=4, val_check_interval=2,
        callbacks=[ActivationMonitor(every_n_steps=1), capture],
    )  # fmt: skip
    trainer.fit(Net(), loader(samples=32, batch_size=4), loader(samples=100, seed=1))
    events = read_events(tmp_path)
    for step in (0, 1):
        (histogram,) = (h for h in events.Histograms("layer_hist/body.2") if h.step == step)
        assert sum(histogram.histogram_value.bucket) == 4 * 4 * 8
        values = torch.cat(capture.outputs["train", step, "body.2"])
        assert scalar(events, "layer_mean/body.2")[step] == pytest.approx(values.mean().item(), abs=1e-6)
    assert {sum(h.histogram_value.bucket) for h in events.Histograms("layer_val_hist/body.2")} == {100 * 8}


def test_every_evaluation_of_its_own_is_recorded(tmp_path):
    monitor = ActivationMonitor()
    for name in ("first", "second"):
        quiet_trainer(tmp_path / name, callbacks=[monitor]).validate(Net(), loader(), verbose=False)
        assert list(scalar(read_events(tmp_path / name), "layer_val_std/body.2")) == [0]


def test_several_optimizers_leap_over_multiples(tmp_path):
    class Three(Net):
        automatic_optimization = False

        def training_step(self, batch):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                loss = super().training_step(batch)
                self.manual_backward(loss)
                optimizer.step()
            self.log("loss", loss)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(3)]

    quiet_trainer(tmp_path, max_steps=30, callbacks=[ActivationMonitor(every_n_steps=5)]).fit(
        Three(), loader(samples=80)
    )
    # Where self.log puts what this step logs: batches are counted, each of which is three steps.
    events = read_events(tmp_path)
    assert list(scalar(events, "layer_std/body.2")) == [0, 2, 4, 5, 7, 9]
    assert list(scalar(events, "loss")) == list(range(10))


def test_a_recomputed_forward_pass_counts_once(tmp_path):
    class Checkpointed(Net):
        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
            return self.head(x)

    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(Checkpointed(), loader())
    assert sum(read_events(tmp_path).Histograms("layer_hist/body.2")[0].histogram_value.bucket) == 8 * 8


def test_a_watched_module_without_a_tensor_is_told(tmp_path):
    class Shape(nn.ReLU):
        def forward(self, x):
            return x.shape

    class WithShape(Net):
        def forward(self, x):
            self.body[4](x)
            return self.head(self.body[3](self.body[:3](x))[:, :6])

    model = WithShape()
    model.body[4] = Shape()
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(model, loader())
    assert "These put out no floating tensor: body.4 (Size)." in watched(tmp_path)


def watched(directory):
    """The report of what is watched."""
    (text,) = read_events(directory).Tensors("health/watched/text_summary")
    return text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("make", "suffixes"),
    [
        (lambda x: (x, 0), [":0"]),
        (lambda x: {"logits": x, "rest": [x, x.long()]}, [":logits", ":rest.0"]),
        (lambda x: Output(x, x), [":hidden", ":last"]),
    ],
)
def test_tensors_in_tuples_mappings_and_dataclasses(make, suffixes, tmp_path):
    class Several(nn.ReLU):
        def forward(self, x):
            self.output = super().forward(x)
            return make(self.output)

    class Around(Net):
        def forward(self, x):
            self.body[4](self.body[:4](x))
            return self.head(self.body[4].output)

    model = Around()
    model.body[4] = Several()
    capture = Capture("body.3")
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(), capture]).fit(model, loader())
    events = read_events(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("layer_mean/body.4")]
    assert tags == [f"layer_mean/body.4{suffix}" for suffix in suffixes]
    expected = torch.relu(capture.outputs["train", 0, "body.3"][0]).double().mean().item()
    assert all(scalar(events, tag)[0] == pytest.approx(expected, rel=1e-5) for tag in tags)


def test_a_batch_with_nan_is_blamed_on_the_input(tmp_path):
    data = loader()
    data.dataset.tensors[0][19] = float("nan")
    monitor = ActivationMonitor(check_finite_every_n_steps=1)
    with pytest.warns(
        UserWarning,
        match=r"step 2 \(batch_idx=2\) holds a NaN or an infinity in its entry 0; training goes on",
    ):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Net(), data)
    (found,) = read_events(tmp_path).Tensors("health/first_nonfinite_layer/text_summary")
    assert found.step == 2 and found.tensor_proto.string_val[0].decode() == "input:0"


def test_says_nothing_of_a_healthy_run(tmp_path):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(check_finite_every_n_steps=1)]).fit(
        Net(), loader()
    )
    assert "health/first_nonfinite_layer/text_summary" not in read_events(tmp_path).Tags()["tensors"]


def test_health_pools_the_activations(tmp_path):
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(Net(), loader())
    events = read_events(tmp_path)
    dead = {name: scalar(events, f"layer_dead/{name}")[0] for name in ("body.2", "body.4")}
    assert scalar(events, "health/dead")[0] == pytest.approx((8 * dead["body.2"] + 6 * dead["body.4"]) / 14)
    saturated = scalar(events, "layer_saturated/body.2")[0]
    assert scalar(events, "health/saturated")[0] == pytest.approx(saturated)


@pytest.mark.parametrize(
    ("modules", "watched"),
    [
        (None, {"body.1", "body.2", "body.4"}),
        (["body.*"], {"body.0", "body.1", "body.2", "body.3", "body.4"}),
        ([nn.Linear], {"body.0", "body.3", "head"}),
        (["head", nn.ReLU], {"head", "body.4"}),
        ("body.*", {"body.0", "body.1", "body.2", "body.3", "body.4"}),
        (nn.ReLU, {"body.4"}),
    ],
)
def test_chooses_modules_by_type_or_pattern(modules, watched, tmp_path):
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(modules=modules)]).fit(Net(), loader())
    tags = read_events(tmp_path).Tags()["histograms"]
    assert {tag.partition("/")[2] for tag in tags} == watched


def test_warns_when_there_is_nothing_to_watch(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()], limit_val_batches=0)
    with pytest.warns(UserWarning, match="finds nothing to watch in BoringModel"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize("logger", [False, "csv"])
def test_works_without_tensorboard(logger, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1) if logger else False
    trainer = quiet_trainer(max_steps=1, logger=logger, callbacks=[ActivationMonitor()])
    trainer.fit(Net(), loader())
    assert not logger or "layer_std/body.2" in (tmp_path / "metrics.csv").read_text()


def test_in_place_relu_and_half_precision(tmp_path):
    model = Net()
    model.body[2], model.body[4] = nn.Hardtanh(), nn.ReLU(inplace=True)
    trainer = quiet_trainer(tmp_path, max_steps=1, precision="bf16-mixed", callbacks=[ActivationMonitor()])
    trainer.fit(model, loader())
    events = read_events(tmp_path)
    assert scalar(events, "layer_zero/body.4")[0] > 0 and "layer_saturated/body.2" in events.Tags()["scalars"]


def test_the_same_seed_writes_the_same_numbers(tmp_path):
    runs = []
    for name in ("first", "second"):
        lightning.seed_everything(3)
        model = LitRegressor(depth=2, width=8)
        trainer = quiet_trainer(tmp_path / name, max_steps=20, val_check_interval=5, callbacks=[ActivationMonitor(5)])
        trainer.fit(model, SyntheticRegressionDataModule(num_points=200, seed=3))
        events = read_events(tmp_path / name)
        scalars = {tag: scalar(events, tag) for tag in events.Tags()["scalars"]}
        histograms = {tag: [h.histogram_value for h in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
        runs.append((scalars, histograms))
    assert runs[0] == runs[1] and "layer_val_hist/net.act1" in runs[0][1]


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"every_n_steps": 0}, "give an integer of at least 1"),
        ({"check_finite_every_n_steps": -1}, "give an integer of at least 1"),
        ({"window_samples": 0.5}, "give an integer of at least 1"),
        ({"max_layers": 0}, "give an integer of at least 1"),
        ({"tau": -0.1}, "give a number of at least 0"),
        ({"warn_dead_above": "much"}, "give a share from 0 to below 1"),
        ({"warn_dormant_above": True}, "give a share from 0 to below 1"),
        ({"warn_saturated_above": 50}, "give a share from 0 to below 1"),
        ({"stop_on_nonfinite": True, "check_finite_every_n_steps": None}, "give check_finite_every_n_steps=1"),
    ],
)
def test_bad_arguments_are_named(options, cure):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} is not possible.*{cure}"):
        ActivationMonitor(**options)


def test_a_second_fit_starts_anew(tmp_path):
    monitor, model = ActivationMonitor(every_n_steps=3), Net()
    before = copy.deepcopy(model.state_dict())
    for name in ("first", "second"):
        model.load_state_dict(before)
        quiet_trainer(tmp_path / name, max_epochs=1, callbacks=[monitor]).fit(model, loader(), loader())
    first, second = (read_events(tmp_path / name) for name in ("first", "second"))
    assert first.Tags()["scalars"] == second.Tags()["scalars"]
    assert scalar(first, "layer_val_std/body.2") == scalar(second, "layer_val_std/body.2")


def test_output_gradients_against_those_of_autograd(tmp_path):
    gradients = {}

    class Keeping(Net):
        def training_step(self, batch):
            def keep(module, args, output):
                output.register_hook(lambda grad: gradients.setdefault(self.global_step, []).append(grad.clone()))

            handle = self.body[2].register_forward_hook(keep)
            loss = super().training_step(batch)
            handle.remove()
            return loss

    monitor = ActivationMonitor(every_n_steps=2, output_gradients=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[monitor])
    trainer.fit(Keeping(), loader(samples=64))
    events = read_events(tmp_path)
    for step in (0, 2):
        # Lightning divides the loss by the number of micro-batches.
        values = torch.cat(gradients[step]).double().numpy()
        assert values.size == 2 * 8 * 8
        for name, expected in (("mean", values.mean()), ("std", values.std()), ("max", values.max())):
            assert scalar(events, f"layer_grad_{name}/body.2")[step] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        histogram = next(h for h in events.Histograms("layer_grad_hist/body.2") if h.step == step)
        assert histogram.histogram_value.num == values.size
    assert not any(tag.startswith("layer_val_grad") for tag in events.Tags()["scalars"])


def test_a_gradient_of_a_scaled_loss_is_unscaled(tmp_path):
    class Scaled(Net):
        def training_step(self, batch):
            return super().training_step(batch) * 2.0**16

    class Scaler:
        def get_scale(self):
            return 2.0**16

    tags = []
    for module, scaler in ((Net(), None), (Scaled(), Scaler())):
        directory = tmp_path / str(len(tags))
        torch.manual_seed(0)
        module.load_state_dict(Net().state_dict())
        trainer = quiet_trainer(directory, max_steps=1, callbacks=[ActivationMonitor(output_gradients=True)])
        trainer.precision_plugin.scaler = scaler
        trainer.fit(module, loader())
        tags.append(
            {tag: scalar(read_events(directory), tag)[0] for tag in ("layer_grad_std/body.2", "layer_std/body.2")}
        )
    assert tags[0] == pytest.approx(tags[1], rel=1e-5)


@pytest.mark.parametrize("net", [nn.ReLU, nn.Tanh])
def test_warns_once_of_the_worst_layer(net, tmp_path):
    model = Net(net)
    with torch.no_grad():
        if net is nn.ReLU:
            model.body[3].weight.zero_()
            model.body[3].bias.copy_(torch.tensor([1.0, -1, -1, -1, -1, -1]))
        else:
            model.body[1].weight.fill_(100.0)
    option = "warn_dead_above" if net is nn.ReLU else "warn_saturated_above"
    monitor = ActivationMonitor(every_n_steps=1, window_samples=20, **{option: 0.5})
    with pytest.warns(UserWarning, match=option) as caught:
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
        trainer.fit(model, loader(samples=600, batch_size=200))
    (message,) = [str(warning.message) for warning in caught if option in str(warning.message)]
    if net is nn.ReLU:
        assert "in body.4 (ReLU), 83% of the units are dead" in message and "(training, step 2)." in message
    else:
        # The share is of one step, so that nothing has to be waited for.
        assert "in body.2 (Tanh), " in message and "of the outputs are saturated" in message
        assert "(training, step 0)." in message
    assert "Usual cures: " in message


def test_a_healthy_net_is_not_warned_of(tmp_path):
    monitor = ActivationMonitor(
        every_n_steps=1, window_samples=8, warn_dead_above=0.9, warn_dormant_above=0.9, warn_saturated_above=0.9,
        stop_on_nonfinite=True,
    )  # fmt: skip
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
    # Warnings are errors.
    trainer.fit(Net(), loader(), loader())
    assert trainer.global_step == 5


def test_a_nonfinite_value_stops_training_on_request(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ActivationMonitor(stop_on_nonfinite=True)])
    with pytest.warns(
        UserWarning, match=r"at step 2 the first NaN or infinity is in the output of body\.3 \(Linear\); training stops"
    ):
        trainer.fit(Diverging(), loader())
    assert trainer.global_step == 3


def test_a_batch_with_nan_stops_training_on_request(tmp_path):
    data = loader()
    data.dataset.tensors[0][19] = float("nan")
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ActivationMonitor(stop_on_nonfinite=True)])
    with pytest.warns(
        UserWarning,
        match=r"step 2 \(batch_idx=2\) holds a NaN or an infinity in its entry 0; training stops",
    ):
        trainer.fit(Net(), data)
    assert trainer.global_step == 3


def test_layers_beyond_the_maximum_are_told(tmp_path):
    monitor = ActivationMonitor(modules="body.*", max_layers=2)
    with pytest.warns(UserWarning, match=r"max_layers=2\) leaves out 3 of 5 layers from body\.2 on"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Net(), loader())
    tags = read_events(tmp_path).Tags()["histograms"]
    assert tags == ["layer_hist/body.0", "layer_hist/body.1"]


def test_many_calls_of_a_module_are_pooled_in_the_last(tmp_path):
    class Often(Net):
        def forward(self, x):
            x = self.body[:3](x)
            for _ in range(20):
                x = self.body[2](x)
            return self.head(self.body[3](x))

    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(modules=nn.Tanh)]).fit(Often(), loader())
    events = read_events(tmp_path)
    assert len([tag for tag in events.Tags()["histograms"] if tag.startswith("layer_hist/body.2")]) == 16
    assert events.Histograms("layer_hist/body.2#14")[0].histogram_value.num == 8 * 8
    assert events.Histograms("layer_hist/body.2#15")[0].histogram_value.num == 6 * 8 * 8


def test_the_report_names_what_is_not_seen(tmp_path):
    model = Net()
    model.unused = nn.ReLU()
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(model, loader())
    assert watched(tmp_path) == (
        "3 layers are watched: body.1 (BatchNorm1d), body.2 (Tanh), body.4 (ReLU). "
        "These were not called so far: unused."
    )


def test_only_a_report_without_activations_says_that_functions_are_not_seen(tmp_path):
    class Functional(Net):
        def forward(self, x):
            return self.head(torch.relu(self.body[3](torch.tanh(self.body[1](self.body[0](x))))))

    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(Functional(), loader())
    assert "No activation is among them. One that is called as a function, such as torch.relu" in watched(tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_takes_no_hooks(tmp_path):
    model = Net()
    model.body[4] = torch.jit.script(nn.ReLU())
    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(modules="body.*")]).fit(model, loader())
    tags = read_events(tmp_path).Tags()["histograms"]
    assert "layer_hist/body.2" in tags


def test_a_copy_made_during_training_has_no_hooks_at_work(tmp_path):
    copies = []

    class Copying(Net):
        def on_train_epoch_end(self):
            copies.append(copy.deepcopy(self.body))
            pickle.loads(pickle.dumps(self.body))

    monitor = ActivationMonitor(every_n_steps=1)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Copying(), loader())
    copies[0](torch.randn(4, 3))
    assert all(isinstance(module, nn.Module) for module in copies[0].modules())


def test_a_resumed_training_writes_what_one_without_a_break_writes(tmp_path):
    written = {}
    for name, stops in (("whole", [3]), ("broken", [1, 3])):
        checkpoint = tmp_path / f"{name}.ckpt"
        for stop in stops:
            directory = tmp_path / name / str(stop)
            monitor = ActivationMonitor(every_n_steps=3, window_samples=20)
            trainer = quiet_trainer(directory, max_epochs=stop, callbacks=[monitor])
            torch.manual_seed(0)
            resumed = {"ckpt_path": checkpoint} if checkpoint.exists() else {}
            trainer.fit(Net(), loader(samples=56), loader(), **resumed)
            trainer.save_checkpoint(checkpoint)
            events = read_events(directory)
            for tag in events.Tags()["scalars"]:
                written.setdefault((name, tag), {}).update(scalar(events, tag))
    tags = {tag for _, tag in written}
    # The samples of a window go on through the break, too.
    assert list(written["whole", "layer_dead/body.4"]) == [0, 3, 6, 9, 12, 15, 18]
    for tag in tags:
        whole, broken = written["whole", tag], written["broken", tag]
        assert list(whole) == list(broken), tag
        assert list(broken.values()) == pytest.approx(list(whole.values()), rel=1e-6, abs=1e-7), tag


def test_a_window_with_other_numbers_of_units_each_time(tmp_path):
    class Lengths(Net):
        def training_step(self, batch):
            (x,) = batch
            scores = torch.softmax(x @ x.T, dim=-1)[:, : 2 + self.global_step]
            self.body[2](scores)
            return super().training_step(batch)

    monitor = ActivationMonitor(every_n_steps=1, modules="body.2")
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Lengths(), loader())
    events = read_events(tmp_path)
    assert len(scalar(events, "layer_mean/body.2")) == 5
    # Behind four widths there are no units any more.
    assert list(scalar(events, "layer_dead/body.2")) == [0, 1, 2, 3]


def test_inside_channels_last_and_conv1d_units_are_the_features(tmp_path):
    class Convolutions(Net):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Conv1d(1, 5, 1), nn.ReLU())
            self.two = nn.Sequential(nn.Linear(5, 4), nn.ReLU())

        def forward(self, x):
            x = self.one(x[:, None, :])
            x = self.two(x.transpose(1, 2)[:, None])
            return x.flatten(1)

    model = Convolutions()
    with torch.no_grad():
        for layer, dead in ((model.one[0], 2), (model.two[0], 3)):
            layer.bias.fill_(100.0)
            layer.bias[:dead] = -1000.0
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()])
    trainer.fit(model, loader(samples=460, batch_size=460))
    events = read_events(tmp_path)
    # All of the two and of the three, whatever chance does to the others.
    assert 5 * scalar(events, "layer_dead/one.1")[0] == pytest.approx(2, abs=1e-5)
    assert 4 * scalar(events, "layer_dead/two.1")[0] == pytest.approx(3, abs=1e-5)


def test_an_optimizer_that_evaluates_the_loss_several_times_in_a_step(tmp_path):
    evaluations = []

    class WithLBFGS(Net):
        def training_step(self, batch):
            evaluations.append(self.global_step)
            return super().training_step(batch)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(WithLBFGS(), loader())
    assert len(evaluations) > 1
    # Not further calls of a module, but the same call again.
    histograms = read_events(tmp_path).Histograms("layer_hist/body.2")
    assert [h.histogram_value.num for h in histograms] == [len(evaluations) * 8 * 8]
    assert "layer_hist/body.2#1" not in read_events(tmp_path).Tags()["histograms"]


def test_a_checkpoint_that_an_evaluation_loaded_is_none_of_the_next_fits_business(tmp_path):
    monitor = ActivationMonitor(every_n_steps=2)
    trainer = quiet_trainer(max_epochs=2, callbacks=[monitor])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer(callbacks=[monitor]).validate(Net(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Net(), loader())
    assert list(scalar(read_events(tmp_path), "layer_std/body.2")) == [0, 2, 4]


def test_a_fit_that_goes_on_keeps_the_cadence(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(every_n_steps=3)])
    model = Net()
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert list(scalar(read_events(tmp_path), "layer_std/body.2")) == [0, 3, 6, 9]


@pytest.mark.parametrize(("call", "cure"), [
    (lambda: tap([torch.ones(2)], "gate"), r"x of tap\(x, 'gate'\) is a list: give a tensor"),
    (lambda: tap(torch.ones(2), "gate", (1.0,)), r"limits=\(1.0,\) of tap\(x, 'gate'\) is not possible: give a pair"),
])  # fmt: skip
def test_bad_taps_are_told_at_once(call, cure):
    with pytest.raises(ValueError, match=cure):
        call()


def test_tensors_that_are_not_dense_are_passed_over(tmp_path):
    class Sparse(Net):
        def forward(self, x):
            for made in (x.to_sparse(), x.to("meta")):
                tap(made, "odd")
            return super().forward(tap(x, "even"))

    quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor()]).fit(Sparse(), loader())
    events = read_events(tmp_path)
    tags = events.Tags()["histograms"]
    assert "layer_hist/even" in tags and not any("odd" in tag for tag in tags)
    (watched,) = events.Tensors("health/watched/text_summary")
    assert "odd (a sparse tensor), odd\\#1 (a tensor without values" in watched.tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_layers_that_put_out_nested_tensors_in_evaluations_only(tmp_path):
    class Padded(Plain):
        def __init__(self):
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation=nn.ReLU())
            super().__init__(nn.TransformerEncoder(layer, 1))

        def training_step(self, batch):
            mask = torch.zeros(8, 5, dtype=torch.bool)
            mask[:, 3:] = True
            return self.net(batch[0], src_key_padding_mask=mask).square().mean()

        validation_step = training_step

    data = DataLoader(TensorDataset(torch.randn(8, 5, 4)), 8)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(1)]).fit(Padded(), data, data)
    events = read_events(tmp_path)
    number = {
        phase: events.Histograms(f"layer_{phase}hist/net.layers.0.activation")[0].histogram_value.num
        for phase in ("", "val_")
    }
    # With padding, and without.
    assert number == {"": 8 * 5 * 8, "val_": 8 * 3 * 8}


def _four(key):
    return ()


def _fourth_powers(call):
    return call.fill(0.0).double().pow(4).sum()


def _kurtosis(layer):
    return float(layer.values.sums["fourth_powers"]) * layer.values.finite / layer.values.sum_squares**2


KURTOSIS = Statistic(
    "kurtosis",
    _kurtosis,
    "Mean fourth power over the squared mean square of the outputs.",
    "Below about 10.",
    sum=Sum("fourth_powers", _four, _fourth_powers),
    look=Look("kurtosis", high=20.0, ticks={0.0: "0", 20.0: "20"}),
)


def test_one_declaration_is_a_tag_a_description_a_chart_and_a_part_of_the_picture(tmp_path):
    model = Net()
    monitor = ActivationMonitor(every_n_steps=2, statistics=[KURTOSIS])
    outputs = []
    model.body[2].register_forward_hook(lambda module, args, output: outputs.append(output.detach().double()))
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[monitor])
    trainer.fit(model, loader(samples=100, batch_size=20))
    events = read_events(tmp_path)
    values = scalar(events, "layer_kurtosis/body.2")
    for step in (0, 2, 4):
        x = outputs[step].numpy()
        assert values[step] == pytest.approx((x**4).mean() / (x**2).mean() ** 2, rel=1e-5)
    metadata = events.SummaryMetadata("layer_kurtosis/body.2")
    assert metadata.summary_description == f"{KURTOSIS.description} Healthy: {KURTOSIS.healthy}"
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert "layer_kurtosis" in [chart.title for chart in layout.category[0].chart]
    drawn = []
    with patch("bnlightning.writing.writers.draw_png", side_effect=lambda draw: drawn.append(draw()) or (b"", 1, 1)):
        quiet_trainer(tmp_path / "again", max_steps=5, callbacks=[monitor]).fit(model, loader(100, 20))
    assert any(text.get_text() == KURTOSIS.look.title for figure in drawn for text in figure.axes[0].texts)


def test_a_callback_with_a_declaration_of_its_own_is_pickled():
    monitor = pickle.loads(pickle.dumps(ActivationMonitor(every_n_steps=2, statistics=[KURTOSIS])))
    assert monitor.every_n_steps == 2


def test_an_evaluation_outside_of_a_fit_and_a_fit_know_nothing_of_each_other(tmp_path):
    class Dead(Net):
        def __init__(self):
            super().__init__()
            nn.init.constant_(self.body[3].bias, -100.0)

    monitor = ActivationMonitor(every_n_steps=2, warn_dead_above=0.5, window_samples=8)
    for name in ("first", "second"):
        # Each of them warns by itself.
        with pytest.warns(UserWarning, match="warn_dead_above"):
            quiet_trainer(tmp_path / name, callbacks=[monitor]).validate(Dead(), loader(samples=160), verbose=False)
    quiet_trainer(tmp_path / "fit", max_steps=5, callbacks=[monitor]).fit(Net(), loader())
    before = monitor.state_dict()
    with pytest.warns(UserWarning, match="warn_dead_above"):
        quiet_trainer(tmp_path / "third", callbacks=[monitor]).validate(Dead(), loader(samples=160), verbose=False)
    after = monitor.state_dict()
    assert (after["schedule"], after["troubles"]) == (before["schedule"], before["troubles"])
    assert repr(after["monitor"]) == repr(before["monitor"])
    assert after["history"]["steps"] == before["history"]["steps"] == [0, 2, 4]


def test_an_evaluation_at_the_start_of_a_second_fit_stands_where_that_fit_is(tmp_path):
    monitor = ActivationMonitor(every_n_steps=2)
    quiet_trainer(tmp_path / "first", max_steps=5, callbacks=[monitor]).fit(Net(), loader())

    class EvaluatesFirst(Net):
        def on_train_start(self):
            # Within the fit, before its first batch.
            monitor.on_validation_start(self.trainer, self)
            monitor.on_validation_batch_start(self.trainer, self, None, 0)
            self(torch.ones(4, 3))
            monitor.on_validation_epoch_end(self.trainer, self)

    quiet_trainer(tmp_path / "second", max_steps=1, callbacks=[monitor]).fit(EvaluatesFirst(), loader())
    assert list(scalar(read_events(tmp_path / "second"), "layer_val_mean/body.2")) == [0]


class Truth(lightning.Callback):
    """Keeps the share of units that are zero for the whole training set, with the weights of each sampled step."""

    def __init__(self, x, every):
        self.x, self.every, self.dead = x, every, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % self.every == 0:
            one, _, two, *_ = pl_module.net
            with torch.no_grad():
                hidden = torch.relu(nn.functional.linear(self.x, one.weight, one.bias))
                output = torch.relu(nn.functional.linear(hidden, two.weight, two.bias))
            self.dead[trainer.global_step] = float((output == 0).all(dim=0).double().mean())


class Dying(lightning.LightningModule):
    """A learning rate that is far too high kills most of the second layer within 300 steps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_dead_units_follows_the_truth(seed, tmp_path):
    torch.manual_seed(seed)
    x = torch.randn(2000, 20)
    data = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=32, shuffle=True)
    truth = Truth(x, every=10)
    monitor = ActivationMonitor(every_n_steps=10, warn_dead_above=0.5)
    with pytest.warns(UserWarning, match="of the units are dead") as caught:
        quiet_trainer(tmp_path, max_steps=500, callbacks=[monitor, truth]).fit(Dying(), data)
    told, true = scalar(read_events(tmp_path), "layer_dead/net.3"), truth.dead
    assert told.keys() == true.keys()
    # A unit that has died is told at the next sampled step or the one after, unless it fired seldom before.
    assert np.mean([abs(told[step] - true[step]) for step in true]) <= 0.1
    assert told[490] == pytest.approx(true[490], abs=0.05)
    (message,) = [str(warning.message) for warning in caught if "are dead" in str(warning.message)]
    warned_at = int(re.search(r"\(training, step (\d+)\)", message)[1])
    assert warned_at <= min(step for step in true if true[step] > 0.5) + 20


def test_a_layer_that_is_dead_from_the_start_is_told_at_the_start(tmp_path):
    module = Dying()
    nn.init.constant_(module.net[2].bias, -100.0)
    x = torch.randn(320, 20, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, torch.zeros(320, dtype=torch.long)), batch_size=32)
    monitor = ActivationMonitor(warn_dead_above=0.5)
    with pytest.warns(UserWarning, match=r"in net\.3 \(ReLU\), 100% of the units are dead.*\(training, step 0\)"):
        quiet_trainer(tmp_path, max_steps=2, callbacks=[monitor]).fit(module, data)


class Scored(nn.Module):
    """Attention with a mask, however it is given."""

    def __init__(self, give):
        super().__init__()
        self.scores, self.maker, self.softmax = nn.Linear(3, 3), Masked(), nn.Softmax(-1)
        self.attention, self.head, self.give = Attention(), nn.Linear(3, 1), give

    def forward(self, x):
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)
        if self.give == "module":
            x = self.softmax(self.maker(self.scores(x)))
        else:
            args, kwargs = {
                "position": ((x, mask), {}),
                "keyword": ((x,), {"mask": mask}),
                "mapping": ((x,), {"mask": {"causal": [mask]}}),
            }[self.give]
            x = self.attention(*args, **kwargs)
        return self.head(x)


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(torch.eye(*x.shape, dtype=torch.bool), float("-inf"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x, mask):
        mask = mask["causal"][0] if isinstance(mask, dict) else mask
        return torch.softmax(x @ self.weight @ x.T + mask, -1) @ x


@pytest.fixture(params=["cpu", "meta"], ids=["immediate", "deferred"])
def each_check(request, monkeypatch):
    """The check of a CPU, or that of other devices."""
    monkeypatch.setattr(
        "bnlightning.monitors.activations.make_check", lambda device: make_check(torch.device(request.param))
    )


class Plain(lightning.LightningModule):
    """A loss and a network, and nothing else."""

    def __init__(self, net, loss=lambda net, x: net(x).square().mean()):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch):
        return self.loss(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.usefixtures("each_check")
@pytest.mark.parametrize("give", ["position", "keyword", "mapping", "module"])
def test_a_healthy_training_with_a_mask_goes_on(give, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ActivationMonitor(1, stop_on_nonfinite=True)])
    # Warnings are errors.
    trainer.fit(Plain(Scored(give)), loader())
    assert trainer.global_step == 10


def perceptron():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def standardised(net, x):
    x = torch.cat([x[:, :2], torch.ones(len(x), 1)], 1)
    return net((x - x.mean(0)) / x.std(0)).mean()


def between(net, x):
    return net[2](torch.log(-net[1](net[0](x)).abs() - 1)).mean()


@pytest.mark.usefixtures("each_check")
@pytest.mark.parametrize(
    ("loss", "step", "place"),
    [
        (standardised, 0, "before net.0"),
        (between, 0, "before net.2"),
        (lambda net, x: torch.log(net(x) * 0).mean(), 0, "after net.2"),
        # The loss is finite, and its gradient is not.
        (lambda net, x: torch.sqrt(net(x) * 0).mean(), 1, "parameter net.0.weight"),
    ],
    ids=["before the first module", "between modules", "behind the last module", "in the gradient"],
)
def test_where_a_value_that_is_not_finite_was_made(loss, step, place, tmp_path):
    with pytest.warns(UserWarning, match="ActivationMonitor: at step"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(1)]).fit(Plain(perceptron(), loss), loader())
    (found,) = read_events(tmp_path).Tensors("health/first_nonfinite_layer/text_summary")
    assert (found.step, found.tensor_proto.string_val[0].decode()) == (step, place)


@pytest.mark.usefixtures("each_check")
def test_an_update_within_a_batch_is_blamed(tmp_path):
    class Adversarial(Plain):
        def __init__(self):
            super().__init__(nn.ModuleDict({"generator": perceptron(), "critic": nn.Linear(1, 1)}))
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.net.values()]

        def training_step(self, batch):
            for optimizer, loss in zip(self.optimizers(), (self.first, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss(batch[0]))
                optimizer.step()

        def first(self, x):
            return torch.sqrt(self.net["generator"](x) * 0).mean()

        def second(self, x):
            return self.net["critic"](self.net["generator"](x)).mean()

    with pytest.warns(UserWarning, match="ActivationMonitor: at step"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(1)]).fit(Adversarial(), loader())
    (found,) = read_events(tmp_path).Tensors("health/first_nonfinite_layer/text_summary")
    assert (found.step, found.tensor_proto.string_val[0].decode()) == (0, "parameter net.generator.0.weight")


def penalised(net, x):
    x = x.clone().requires_grad_()
    net.hidden = net[1](net[0](x))
    y = net[2](net.hidden).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    return gradient.square().mean() + y.square()


def doubled(net, x):
    x = x.clone().requires_grad_()
    net.hidden = net[1](net[0](x))
    y = net[2](net.hidden).sum()
    y.backward(create_graph=True)
    return x.grad.square().mean() + y.square()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("loss", [penalised, doubled])
def test_only_the_gradients_of_the_loss_s_own_backward_pass_count(loss, tmp_path):
    model = Plain(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), loss)
    start = copy.deepcopy(model.state_dict())
    monitor = ActivationMonitor(1, output_gradients=True)
    quiet_trainer(tmp_path, max_steps=1, callbacks=[monitor]).fit(model, loader())
    model.load_state_dict(start)
    (x,) = next(iter(loader()))
    (truth,) = torch.autograd.grad(loss(model.net, x), model.net.hidden)
    events = read_events(tmp_path)
    assert events.Histograms("layer_grad_hist/net.1")[0].histogram_value.num == truth.numel()
    assert scalar(events, "layer_grad_std/net.1")[0] == pytest.approx(truth.std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "statistic", "expected"),
    [
        (torch.linspace(0.1, 1, 8).double() * 1e-60, "dead", 0.0),
        (torch.linspace(0.1, 1, 8).double() * 1e-60, "zero", 0.0),
        (torch.linspace(0.1, 1, 8).double() * 1e60, "nonfinite", 0.0),
        (torch.linspace(0.1, 1, 8, dtype=torch.float64) + 1e9, "std", np.linspace(0.1, 1, 8).std()),
        (torch.complex(torch.zeros(8), torch.linspace(-1, 1, 8)), "max", 1.0),
        (torch.tensor([2**24 + 1, 2**24 + 2]), "std", 0.5),
    ],
    ids=["tiny, dead", "tiny, zero", "huge", "far from zero", "complex", "large integers"],
)
def test_values_that_float32_cannot_hold(values, statistic, expected, tmp_path):
    def loss(net, x):
        tap(values, "tapped")
        return net(x).square().mean()

    # Three steps make pictures, too.
    trainer = quiet_trainer(tmp_path, max_steps=3, precision="64-true", callbacks=[ActivationMonitor(1)])
    trainer.fit(Plain(perceptron(), loss), loader())
    assert scalar(read_events(tmp_path), f"layer_{statistic}/tapped")[0] == pytest.approx(expected, abs=1e-6)
