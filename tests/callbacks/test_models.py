"""The promise of callbacks, monitors and writers on networks that people use: the numbers in the event file are right.

Each number is held against numpy on the tensors that the layers put out.
"""

import lightning
import numpy as np
import pytest
import torch
import torchvision
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.demos import Transformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import MLP, ActivationMonitor
from bnlightning.nn import get_act_layer, get_norm_layer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]

WATCHED = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


class Lit(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return self.net(*batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def mlp():
    return MLP([12, 16, 16, 16, 4], norm_layer=get_norm_layer("custom"), act_layer=get_act_layer("tanh"))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(150, 8),
        nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip


NETS = {
    "MLP": (mlp, (16, 12)),
    "convolutions": (convolutions, (8, 3, 12, 12)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), (4, 3, 32, 32)),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=4), (2, 3, 64, 64)),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), (4, 3, 64, 64)),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=32, num_classes=4), (2, 3, 32, 32)),
    "Lightning's Transformer": (lambda: Transformer(vocab_size=20, ninp=16, nhead=2, nhid=24, nlayers=2), (4, 10)),
}


class Capture(lightning.Callback):
    def __init__(self):
        self.outputs = {}

    def on_fit_start(self, trainer, pl_module):
        for name, module in pl_module.named_modules():
            if isinstance(module, WATCHED):
                # Before the monitor's: an operation in place may follow.
                module.register_forward_hook(self._keep(name), prepend=True)

    def _keep(self, name):
        def keep(module, args, output):
            calls = sum(known.partition("#")[0] == name for known in self.outputs)
            self.outputs[f"{name}#{calls}" if calls else name] = output.detach().double().numpy().copy()

        return keep


def expected_statistics(values, with_units):
    expected = {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "zero": (values == 0).mean(),
        "nonfinite": 0.0,
    }
    if with_units:
        # Channels of images; features, the last dimension, of everything else here.
        matrix = np.moveaxis(values, 1 if values.ndim == 4 else -1, -1)
        matrix = matrix.reshape(-1, matrix.shape[-1])
        magnitude = np.abs(matrix).mean(axis=0)
        # Never after so few samples.
        expected["dead"] = 0.0
        expected["dormant"] = (magnitude <= 0.025 * magnitude.mean()).mean()
        expected["rarely_active"] = ((matrix != 0).mean(axis=0) < 0.01).mean()
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_numbers_of_a_network(name, tmp_path):
    make, shape = NETS[name]
    torch.manual_seed(0)
    module = Lit(make())
    batches = [torch.randn(shape)] if name != "Lightning's Transformer" else [torch.randint(0, 20, shape)] * 2
    capture = Capture()
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ActivationMonitor(max_layers=500), capture])
    trainer.fit(module, DataLoader(TensorDataset(*batches), batch_size=shape[0]))
    events = read_events(tmp_path)
    histograms = [tag.removeprefix("layer_hist/") for tag in events.Tags()["histograms"]]
    assert set(histograms) == set(capture.outputs) and len(histograms) >= 3
    for label, values in capture.outputs.items():
        with_units = not isinstance(module.get_submodule(label.partition("#")[0]), NORMS)
        for statistic, value in expected_statistics(values, with_units).items():
            found = scalar(events, f"layer_{statistic}/{label}")[0]
            assert found == pytest.approx(value, rel=2e-5, abs=2e-6 * max(values.std(), 1e-3)), (label, statistic)
        (histogram,) = events.Histograms(f"layer_hist/{label}")
        assert sum(histogram.histogram_value.bucket) == histogram.histogram_value.num == values.size
        assert histogram.histogram_value.sum == pytest.approx(values.sum(), rel=1e-4, abs=1e-5 * values.size)
