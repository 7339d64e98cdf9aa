import copy
import pickle

import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 0
        self.after[step] = {
            name: parameter.detach().double().numpy().copy() for name, parameter in pl_module.named_parameters()
        }


def norm(*arrays):
    return np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays))


def expected(gradients, before, after):
    """All scalars of one sample, in float64."""
    want = {}
    for name, gradient in gradients.items():
        want[f"grad_norm/{name}"] = norm(gradient)
        want[f"grad_rms/{name}"] = np.sqrt((gradient**2).mean())
        if norm(before[name]) > 0:
            want[f"update_ratio/{name}"] = norm(after[name] - before[name]) / norm(before[name])
    norms = [norm(gradient) for gradient in gradients.values() if gradient.ndim >= 2]
    want["health/grad_norm"] = norm(*gradients.values())
    want["health/grad_norm_ratio"] = max(norms) / min(norms)
    want["health/grad_zero"] = want["health/grad_nonfinite"] = 0.0
    updates = [after[name] - before[name] for name in gradients]
    want["health/update_ratio"] = norm(*updates) / norm(*(before[name] for name in gradients))
    return want


def written(events, step):
    """All scalars of the monitor at a step."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("grad_", "update_ratio/", "health/"))]
    found = {tag: scalar(events, tag).get(step) for tag in tags}
    return {tag: value for tag, value in found.items() if value is not None}


def check(events, capture, steps, rel=1e-5):
    """Everything in the event file against numpy on what was captured."""
    assert sorted(scalar(events, "health/grad_norm")) == steps
    for step in steps:
        gradients = capture.gradients[step]
        want = expected(gradients, capture.before[step], capture.after[step])
        assert written(events, step) == pytest.approx(want, rel=rel, abs=1e-30)
        for name, gradient in gradients.items():
            (histogram,) = (h.histogram_value for h in events.Histograms(f"grad_hist/{name}") if h.step == step)
            assert sum(histogram.bucket) == histogram.num == gradient.size
            assert histogram.min == pytest.approx(gradient.min(), rel=1e-6)
            assert histogram.max == pytest.approx(gradient.max(), rel=1e-6)
            assert histogram.sum == pytest.approx(gradient.sum(), rel=1e-5, abs=1e-6)
            assert histogram.sum_squares == pytest.approx((gradient**2).sum(), rel=1e-5)
            # Every bucket, against a count of the values between its limits.
            edges = np.array([-np.inf, *histogram.bucket_limit[:-1], np.inf])
            counts, _ = np.histogram(gradient.astype(np.float32), edges)
            assert np.abs(np.cumsum(counts) - np.cumsum(histogram.bucket)).max() <= 1


def test_logs_what_numpy_makes_of_gradients_and_weights(tmp_path):
    capture = Capture()
    events = fit(tmp_path, monitor=GradientMonitor(every_n_steps=4), callbacks=[capture], max_epochs=2)
    assert set(capture.gradients[4]) == set(USED)
    check(events, capture, [0, 4, 8])
    # On the x-axis of what Lightning logs.
    assert set(scalar(events, "health/grad_norm")) <= set(scalar(events, "train/loss"))
