import copy
import os
import pickle

import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, run_on_ranks, scalar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bnlightning import GradientMonitor

# The loaders have no workers, as they need none, and many tests only train.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
]


class Net(lightning.LightningModule):
    """A user's module: five parameters with a gradient, a frozen one, and one that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6, bias=False))
        self.head = nn.Linear(6, 1)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch):
        (x,) = batch
        loss = (self(x) - x.sum(dim=1, keepdim=True)).square().mean()
        self.log("train/loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


USED = ["body.0.weight", "body.0.bias", "body.2.weight", "head.weight", "head.bias"]
MATRICES = ["body.0.weight", "body.2.weight", "head.weight"]


def loader(samples=40, batch_size=8, seed=0):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def fit(directory, model=None, data=None, monitor=None, callbacks=(), **options):
    """Fit, and read what was written."""
    torch.manual_seed(0)
    model = Net() if model is None else model() if isinstance(model, type) else model
    monitor = GradientMonitor(every_n_steps=1) if monitor is None else monitor
    options = {"max_epochs": 1} | options
    quiet_trainer(directory, callbacks=[monitor, *callbacks], **options).fit(model, data or loader())
    return read_events(directory)


class Capture(lightning.Callback):
    """Keeps what the definitions are about, by the step of the x-axis: gradients, weights before and after."""

    def __init__(self, scale=1.0):
        self.gradients, self.before, self.after, self.scale = {}, {}, {}, scale

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (name,) = (name for name, other in pl_module.named_parameters() if other is parameter)
                    gradient = parameter.grad.detach().double().numpy() / self.scale
                    self.gradients.setdefault(step, {})[name] = gradient.copy()
                    self.before.setdefault(step, {})[name] = parameter.detach().double().numpy().copy()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.after[step] = {
            name: parameter.detach().double().numpy().copy() for name, parameter in pl_module.named_parameters()
        }


def norm(*arrays):
    return np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays))


def expected(gradients, before, after):
    """All scalars of one sample, in float64."""
    want = {}
    for name, gradient in gradients.items():
        want[f"param_grad_norm/{name}"] = norm(gradient)
        want[f"param_grad_rms/{name}"] = np.sqrt((gradient**2).mean())
        if norm(before[name]) > 0:
            want[f"param_update_ratio/{name}"] = norm(after[name] - before[name]) / norm(before[name])
    norms = [norm(gradient) for gradient in gradients.values() if gradient.ndim >= 2]
    want["health/grad_norm"] = norm(*gradients.values())
    want["health/grad_norm_ratio"] = max(norms) / min(norms)
    want["health/grad_zero"] = want["health/grad_nonfinite"] = 0.0
    updates = [after[name] - before[name] for name in gradients]
    want["health/update_ratio"] = norm(*updates) / norm(*(before[name] for name in gradients))
    return want


def written(events, step):
    """All scalars of the monitor at a step."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("param_", "health/"))]
    found = {tag: scalar(events, tag).get(step) for tag in tags}
    return {tag: value for tag, value in found.items() if value is not None}


def bucket_counts(values, limits):
    """A value on a limit belongs to the bucket that is farther from zero."""
    edges = np.array([-np.inf, *limits[:-1], np.inf])
    negative, _ = np.histogram(-values[values < 0], -edges[::-1])
    positive, _ = np.histogram(values[values >= 0], edges)
    return (negative[::-1] + positive).tolist()


def check(events, capture, steps, rel=1e-5):
    """Everything in the event file against numpy on what was captured."""
    assert sorted(scalar(events, "health/grad_norm")) == steps
    for step in steps:
        gradients = capture.gradients[step]
        want = expected(gradients, capture.before[step], capture.after[step])
        assert written(events, step) == pytest.approx(want, rel=rel, abs=1e-30)
        for name, gradient in gradients.items():
            (histogram,) = (h.histogram_value for h in events.Histograms(f"param_grad_hist/{name}") if h.step == step)
            assert sum(histogram.bucket) == histogram.num == gradient.size
            # A single value gets a bucket with a width.
            tolerance = 1e-6 if np.ptp(gradient) > 0 else 2e-3
            assert histogram.min == pytest.approx(gradient.min(), rel=tolerance)
            assert histogram.max == pytest.approx(gradient.max(), rel=tolerance)
            assert histogram.sum == pytest.approx(gradient.sum(), rel=1e-5, abs=1e-6)
            assert histogram.sum_squares == pytest.approx((gradient**2).sum(), rel=1e-5)
            assert bucket_counts(gradient, histogram.bucket_limit) == histogram.bucket


def test_logs_what_numpy_makes_of_gradients_and_weights(tmp_path):
    capture = Capture()
    events = fit(tmp_path, monitor=GradientMonitor(every_n_steps=4), callbacks=[capture], max_epochs=2)
    assert set(capture.gradients[4]) == set(USED)
    check(events, capture, [0, 4, 8])
    # On the x-axis of what Lightning logs.
    assert set(scalar(events, "health/grad_norm")) <= set(scalar(events, "train/loss"))


def test_training_is_bit_identical_with_and_without(tmp_path):
    states = []
    for callbacks in ([], [GradientMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        model = Net()
        model.body.append(nn.Dropout(0.5))
        trainer = quiet_trainer(
            tmp_path / str(len(callbacks)), max_epochs=2, gradient_clip_val=0.1, callbacks=callbacks
        )
        trainer.fit(model, loader(), loader(seed=1))
        states.append((model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_sees_the_gradient_before_clipping(tmp_path):
    capture = Capture()
    events = fit(tmp_path, callbacks=[capture], gradient_clip_val=1e-3, max_steps=3)
    check(events, capture, [0, 1, 2])
    assert scalar(events, "health/grad_norm")[0] > 0.1
    # The first step has no momentum yet: the learning rate times a clipped gradient.
    weights = norm(*(capture.before[0][name] for name in USED))
    assert scalar(events, "health/update_ratio")[0] == pytest.approx(0.1 * 1e-3 / weights, rel=1e-2)


def test_the_model_may_clip_as_it_likes(tmp_path):
    class Clipping(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.sign_()

    capture = Capture()
    check(fit(tmp_path, Clipping, callbacks=[capture], max_steps=2), capture, [0, 1])


def test_gradient_accumulation_makes_one_gradient(tmp_path):
    whole, parts = (
        fit(tmp_path / name, data=loader(batch_size=batch_size), monitor=GradientMonitor(every_n_steps=2), **options)
        for name, batch_size, options in (("whole", 8, {}), ("parts", 2, {"accumulate_grad_batches": 4}))
    )
    assert whole.Tags()["scalars"] == parts.Tags()["scalars"]
    for step in (0, 2, 4):
        assert written(parts, step) == pytest.approx(written(whole, step), rel=1e-4)
    assert list(scalar(parts, "health/grad_norm")) == [0, 2, 4]


class Broken(Net):
    """Has bad values in a gradient from step 1 on."""

    bad = (torch.nan, torch.inf)

    def on_after_backward(self):
        if self.global_step >= 1:
            self.body[2].weight.grad.view(-1)[: len(self.bad)] = torch.tensor(self.bad)


def test_counts_what_is_not_finite_and_masks_it(tmp_path):
    capture = Capture()
    events = fit(tmp_path, Broken, callbacks=[capture], max_steps=3)
    gradients = capture.gradients[1]
    finite = gradients["body.2.weight"].ravel()[2:]
    sample = written(events, 1)
    assert sample["param_grad_nonfinite/body.2.weight"] == pytest.approx(2 / 48)
    assert sample["health/grad_nonfinite"] == pytest.approx(1 / 5)
    assert sample["param_grad_norm/body.0.weight"] == pytest.approx(norm(gradients["body.0.weight"]))
    assert not sample.keys() & {
        "param_grad_norm/body.2.weight", "param_grad_rms/body.2.weight", "param_update_ratio/body.2.weight",
        "health/grad_norm", "health/grad_norm_ratio", "health/update_ratio", "param_grad_nonfinite/body.0.weight",
    }  # fmt: skip
    (histogram,) = (h.histogram_value for h in events.Histograms("param_grad_hist/body.2.weight") if h.step == 1)
    assert sum(histogram.bucket) == histogram.num == 46
    assert (histogram.min, histogram.max) == pytest.approx((finite.min(), finite.max()))
    assert histogram.sum == pytest.approx(finite.sum(), rel=1e-5)
    assert histogram.sum_squares == pytest.approx((finite**2).sum(), rel=1e-5)
    # Then the network is lost: all gradients are NaN, and training goes on.
    assert scalar(events, "health/grad_nonfinite") == pytest.approx({0: 0.0, 1: 0.2, 2: 1.0})
    assert {tag: value for tag, value in written(events, 2).items() if value != 1.0} == {"health/grad_zero": 0.0}
    assert [h.step for h in events.Histograms("param_grad_hist/body.0.weight")] == [0, 1]
    for tag in events.Tags()["scalars"]:
        assert tag == "train/loss" or np.isfinite(list(scalar(events, tag).values())).all(), tag


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_norms_hold_where_float32_squares_do_not(factor, tmp_path):
    class Scaled(Net):
        def training_step(self, batch):
            return super().training_step(batch) * factor

    capture = Capture()
    events = fit(tmp_path, Scaled, callbacks=[capture], max_steps=1)
    want = expected(capture.gradients[0], capture.before[0], capture.after[0])
    got = written(events, 0)
    assert got["health/grad_norm"] > 0 and np.isfinite(got["health/grad_norm"])
    assert got == pytest.approx(want, rel=1e-5, abs=0)


def test_a_large_parameter_keeps_its_digits(tmp_path):
    # In one float32 sum over these, the last digits of most squares would be lost.
    class Large(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3000, 2000))

        def training_step(self, batch):
            return super().training_step(batch) + (self.table * self.coefficients).sum()

        def on_fit_start(self):
            self.coefficients = torch.full((3000, 2000), 0.1)

    capture = Capture()
    events = fit(tmp_path, Large, callbacks=[capture], max_steps=1)
    gradient = capture.gradients[0]["table"]
    assert scalar(events, "param_grad_norm/table")[0] == pytest.approx(norm(gradient), rel=1e-5)
    update = norm(capture.after[0]["table"] - capture.before[0]["table"]) / norm(capture.before[0]["table"])
    assert scalar(events, "param_update_ratio/table")[0] == pytest.approx(update, rel=1e-5)


def test_zero_weights_have_no_ratio_and_zero_gradients_are_counted(tmp_path):
    class Zero(Net):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    sample = written(fit(tmp_path, Zero, max_steps=1), 0)
    assert not sample.keys() & {"param_update_ratio/head.weight", "param_update_ratio/head.bias"}
    assert sample["param_grad_norm/body.2.weight"] == 0.0
    # Only the gradient of the head's weights gets past it.
    assert sample["health/grad_zero"] == pytest.approx(2 / 3)
    assert sample["health/grad_norm_ratio"] == 1.0


class TwoOptimizers(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if self.steps(index, batch_idx):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch))
                optimizer.step()

    def steps(self, index, batch_idx):
        return True

    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.01)]


def test_several_optimizers_make_one_sample(tmp_path):
    capture = Capture()
    events = fit(tmp_path, TwoOptimizers, monitor=GradientMonitor(every_n_steps=4), callbacks=[capture])
    assert set(capture.gradients[0]) == set(USED)
    check(events, capture, [0, 2, 4])


def test_an_optimizer_that_steps_in_every_other_batch_is_not_missed(tmp_path):
    class Alternating(TwoOptimizers):
        def steps(self, index, batch_idx):
            return batch_idx % 2 == index

    events = fit(tmp_path, Alternating, monitor=GradientMonitor(every_n_steps=4), data=loader(samples=80))
    assert list(scalar(events, "param_grad_norm/body.0.weight")) == [0, 4, 8]
    assert list(scalar(events, "param_grad_norm/head.weight")) == [1, 5, 9]


def test_the_last_of_several_steps_in_a_batch_counts(tmp_path):
    class Repeating(TwoOptimizers):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    capture = Capture()
    events = fit(tmp_path, Repeating, callbacks=[capture], max_steps=4)
    check(events, capture, [0, 1])


def test_lbfgs_counts_the_gradient_that_its_step_starts_from(tmp_path):
    class Second(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)

    torch.manual_seed(0)
    model = Second()
    start = copy.deepcopy(model)
    events = fit(tmp_path, model, max_steps=1)
    (x,) = next(iter(loader()))
    (start(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
    before = {name: parameter.detach().double().numpy() for name, parameter in start.named_parameters()}
    after = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    gradients = {name: start.get_parameter(name).grad.double().numpy() for name in USED}
    assert written(events, 0) == pytest.approx(expected(gradients, before, after), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision, tmp_path):
    capture = Capture()
    events = fit(tmp_path, callbacks=[capture], precision=precision, max_steps=2)
    check(events, capture, [0, 1])


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_fp16_is_taken_out(fused, tmp_path):
    class Half(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    capture = Capture(scale=1000.0 if fused else 1.0)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1000.0))
    events = fit(tmp_path, Half, callbacks=[capture], plugins=[plugin], max_steps=2)
    assert 0.1 < scalar(events, "health/grad_norm")[0] < 100
    check(events, capture, [0, 1])


def test_a_compiled_module_keeps_the_names(tmp_path):
    class Silent(Net):
        def training_step(self, batch):
            return self(batch[0]).square().mean()

    capture = Capture()
    check(fit(tmp_path, torch.compile(Silent(), backend="eager"), callbacks=[capture], max_steps=2), capture, [0, 1])


def test_wrappers_are_no_part_of_a_name(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.body[0] = checkpoint_wrapper(model.body[0])
    model.body = torch.compile(model.body, backend="eager")
    # A name of the user's own, which a wrapper would use for what it wraps.
    model.module, model.head = model.head, nn.Identity()
    model.head.forward = model.module.forward
    sample = written(fit(tmp_path, model, max_steps=1), 0)
    names = {tag.partition("/")[2] for tag in sample if tag.startswith("param_grad_norm/")}
    assert names == {"body.0.weight", "body.0.bias", "body.2.weight", "module.weight", "module.bias"}


def test_shared_parameters_count_once(tmp_path):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.tied = nn.Linear(3, 8)
            self.tied.weight = self.body[0].weight
            self.again = self.head

        def forward(self, x):
            return super().forward(x) + self.tied(x).mean(dim=1, keepdim=True)

    capture = Capture()
    events = fit(tmp_path, Shared, callbacks=[capture], max_steps=2)
    assert set(capture.gradients[0]) == {*USED, "tied.bias"}
    check(events, capture, [0, 1])


def test_sparse_gradients_count_what_they_hold(tmp_path):
    class Words(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4, sparse=True)

        def training_step(self, batch):
            return self.words(torch.tensor([1, 3, 3])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = Words()
    weight = model.words.weight.detach().double().numpy().copy()
    events = fit(tmp_path, model, max_steps=1)
    gradient = 2 * weight[[1, 3]] * [[1.0], [2.0]]
    sample = written(events, 0)
    assert sample["param_grad_norm/words.weight"] == pytest.approx(norm(gradient))
    assert sample["param_grad_rms/words.weight"] == pytest.approx(norm(gradient) / np.sqrt(8))
    assert sample["param_update_ratio/words.weight"] == pytest.approx(0.1 * norm(gradient) / norm(weight), rel=1e-5)
    assert sum(events.Histograms("param_grad_hist/words.weight")[0].histogram_value.bucket) == 8


def test_complex_numbers_are_two_values(tmp_path):
    class Complex(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0 + 4.0j, 0.0 - 1.0j]))

        def training_step(self, batch):
            return (self.w * self.w.conj()).real.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.25)

    events = fit(tmp_path, Complex, max_steps=1)
    sample = written(events, 0)
    # The gradient is twice the weight.
    assert sample["param_grad_norm/w"] == pytest.approx(2 * np.sqrt(26))
    assert sample["param_grad_rms/w"] == pytest.approx(2 * np.sqrt(26) / 2)
    assert sample["param_update_ratio/w"] == pytest.approx(0.5)
    assert sum(events.Histograms("param_grad_hist/w")[0].histogram_value.bucket) == 4


def test_gradients_in_the_channels_last_format(tmp_path):
    class Image(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

        def training_step(self, batch):
            return self.conv(batch[0].view(2, 3, 4, 1).expand(2, 3, 4, 4).contiguous()).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    capture = Capture()
    check(fit(tmp_path, Image, callbacks=[capture], max_steps=2), capture, [0, 1])


def test_a_parameter_that_thaws_is_watched_from_then_on(tmp_path):
    class Thawing(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.body.requires_grad_(batch_idx >= 2)

    events = fit(tmp_path, Thawing)
    assert list(scalar(events, "param_grad_norm/body.0.weight")) == [2, 3, 4]
    assert list(scalar(events, "param_grad_norm/head.weight")) == [0, 1, 2, 3, 4]


def test_a_step_without_a_gradient_is_not_a_sample(tmp_path):
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch)

    with pytest.warns(UserWarning, match="returned `None`"):
        events = fit(tmp_path, Skipping, monitor=GradientMonitor(every_n_steps=3))
    assert list(scalar(events, "health/grad_norm")) == [1, 4]


class Failing(Net):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        raise RuntimeError("stop")


def test_leaves_nothing_after_an_exception(tmp_path):
    monitor = GradientMonitor(every_n_steps=3)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path / "failing", Failing, monitor=monitor)
    # Tensors would make it longer; Lightning itself leaves methods of the module.
    fresh = GradientMonitor(every_n_steps=3)
    own = {name: value for name, value in vars(monitor).items() if name in vars(fresh)}
    assert len(pickle.dumps(own)) < len(pickle.dumps(vars(fresh))) + 1000
    after, anew = (
        fit(tmp_path / name, monitor=each)
        for name, each in (("after", monitor), ("anew", GradientMonitor(every_n_steps=3)))
    )
    assert list(scalar(after, "health/grad_norm")) == [0, 3]
    assert [written(after, step) for step in (0, 3)] == [written(anew, step) for step in (0, 3)]
    pickle.loads(pickle.dumps(monitor))


def test_a_second_fit_starts_anew(tmp_path):
    monitor = GradientMonitor(every_n_steps=3)
    first, second = (fit(tmp_path / name, monitor=monitor) for name in ("first", "second"))
    assert list(scalar(first, "health/grad_norm")) == [0, 3]
    assert [written(first, step) for step in (0, 3)] == [written(second, step) for step in (0, 3)]


def test_a_resumed_fit_keeps_the_cadence(tmp_path):
    whole = fit(tmp_path / "whole", monitor=GradientMonitor(every_n_steps=4), max_epochs=2)
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=[GradientMonitor(every_n_steps=4)])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = quiet_trainer(tmp_path / "second", max_epochs=2, callbacks=[GradientMonitor(every_n_steps=4)])
    trainer.fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
    resumed = read_events(tmp_path / "second")
    assert list(scalar(resumed, "health/grad_norm")) == [8]
    assert written(resumed, 8) == written(whole, 8)


@pytest.mark.parametrize(
    ("parameters", "watched"),
    [
        (None, USED),
        ("body.*", ["body.0.weight", "body.0.bias", "body.2.weight"]),
        (["*.bias", "head.weight"], ["body.0.bias", "head.weight", "head.bias"]),
        (lambda path, parameter: parameter.dim() == 2 and path != "head.weight", ["body.0.weight", "body.2.weight"]),
    ],
)
def test_chooses_parameters_by_pattern_or_function(parameters, watched, tmp_path):
    capture = Capture()
    events = fit(tmp_path, monitor=GradientMonitor(1, parameters), callbacks=[capture], max_steps=1)
    want = expected(capture.gradients[0], capture.before[0], capture.after[0])
    sample = written(events, 0)
    for family in ("param_grad_norm", "param_grad_rms", "param_update_ratio"):
        assert {tag for tag in sample if tag.startswith(family)} == {f"{family}/{name}" for name in watched}
    assert set(events.Tags()["histograms"]) == {f"param_grad_hist/{name}" for name in watched}
    # Over all parameters, whichever are chosen.
    for tag in (tag for tag in want if tag.startswith("health/")):
        assert sample[tag] == pytest.approx(want[tag], rel=1e-5)


def test_says_how_many_parameters_are_too_many(tmp_path):
    with pytest.warns(UserWarning, match=r"max_parameters=2\) leaves out 4 of 6 parameters") as caught:
        events = fit(tmp_path, monitor=GradientMonitor(1, max_parameters=2), max_steps=2)
    assert len([warning for warning in caught if "max_parameters" in str(warning.message)]) == 1
    # The first parameter of the module itself has no gradient.
    assert set(events.Tags()["histograms"]) == {"param_grad_hist/body.0.weight"}
    assert scalar(events, "health/grad_zero")[0] == 0.0


def test_warns_when_there_is_nothing_to_watch(tmp_path):
    with pytest.warns(UserWarning, match=r"parameters='net.\*'\) finds nothing to watch in Net"):
        events = fit(tmp_path, monitor=GradientMonitor(1, "net.*"), max_steps=1)
    assert scalar(events, "health/grad_norm")[0] > 0


@pytest.mark.parametrize("parameters", [3, [3], [nn.Linear, 1], ["a", None]])
def test_bad_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=r"parameters=.* is not possible: give patterns of paths"):
        GradientMonitor(parameters=parameters)


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"max_parameters": 0}])
def test_bad_numbers_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not possible: give an integer of at least 1"):
        GradientMonitor(**options)


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_refuses_strategies_that_hide_gradients(name):
    strategy = type(name, (SingleDeviceStrategy,), {})()
    trainer = quiet_trainer(max_steps=1, strategy=strategy, callbacks=[GradientMonitor()])
    with pytest.raises(MisconfigurationException, match=f"GradientMonitor cannot be used with {name}: "):
        trainer.fit(BoringModel())
    trainer.validate(BoringModel(), verbose=False)


@pytest.mark.parametrize("logger", [False, "csv"])
def test_works_without_tensorboard(logger, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1) if logger else False
    trainer = quiet_trainer(max_steps=1, logger=logger, callbacks=[GradientMonitor()])
    trainer.fit(Net(), loader())
    assert not logger or "param_update_ratio/body.2.weight" in (tmp_path / "metrics.csv").read_text()


class Sharded(Net):
    """By FSDP2; the head's weight lies on the first rank alone."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class BrokenSharded(Sharded):
    """One value of a gradient, which lies on the second rank, is not finite."""

    def on_after_backward(self):
        if self.global_rank == 1:
            self.body[2].weight.grad.to_local()[0, 0] = torch.inf


class CountingMonitor(GradientMonitor):
    """Counts its collectives."""

    def on_train_batch_end(self, *args):
        original, self.collectives = torch.distributed.all_reduce, 0

        def counted(*arguments, **options):
            self.collectives += 1
            return original(*arguments, **options)

        torch.distributed.all_reduce = counted
        try:
            super().on_train_batch_end(*args)
        finally:
            torch.distributed.all_reduce = original


def fit_on_rank(rank, directory, model, strategy):
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    monitor = CountingMonitor(every_n_steps=2)
    strategies = {
        # One parameter has no gradient.
        "ddp": lambda: DDPStrategy(find_unused_parameters=True),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    options = {"strategy": strategies[strategy](), "devices": 2, "plugins": [LightningEnvironment()]}
    # Lightning's own sampler would shuffle.
    data = loader().dataset
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    fit(directory, model, DataLoader(data, 4, sampler=sampler), monitor, use_distributed_sampler=False, **options)
    return monitor.collectives


@pytest.mark.slow
@pytest.mark.parametrize(("model", "strategy", "collectives"), [(Net, "ddp", 0), (Sharded, "fsdp2", 3)])
def test_two_ranks_write_what_one_process_writes_on_all_data(model, strategy, collectives, tmp_path):
    found = run_on_ranks(fit_on_rank, 2, tmp_path, tmp_path / "two", model, strategy)
    assert found == [collectives] * 2
    one, two = fit(tmp_path / "one", monitor=GradientMonitor(every_n_steps=2)), read_events(tmp_path / "two")
    assert list(scalar(two, "health/grad_norm")) == [0, 2, 4]
    assert set(two.Tags()["scalars"]) == set(one.Tags()["scalars"])
    for step in (0, 2, 4):
        assert written(two, step) == pytest.approx(written(one, step), rel=1e-4)
    assert two.Tags()["histograms"] == one.Tags()["histograms"]
    for name in USED:
        for first, second in zip(*(each.Histograms(f"param_grad_hist/{name}") for each in (one, two)), strict=True):
            first, second = first.histogram_value, second.histogram_value
            assert second.num == first.num
            assert (second.min, second.max, second.sum, second.sum_squares) == pytest.approx(
                (first.min, first.max, first.sum, first.sum_squares), rel=1e-4, abs=1e-5
            )


@pytest.mark.slow
def test_a_value_that_is_not_finite_on_another_rank_is_counted(tmp_path):
    run_on_ranks(fit_on_rank, 2, tmp_path, tmp_path / "two", BrokenSharded, "fsdp2")
    sample = written(read_events(tmp_path / "two"), 0)
    assert sample["param_grad_nonfinite/body.2.weight"] == pytest.approx(1 / 48)
    assert sample["health/grad_nonfinite"] == pytest.approx(1 / 5)
    assert not sample.keys() & {"param_grad_norm/body.2.weight", "health/grad_norm"}
