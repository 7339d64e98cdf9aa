"""Make the pictures of docs/illnesses.md: five small nets, one healthy and four ill, as TensorBoard shows them.

    pip install selenium
    python docs/tools/illnesses.py [--only dead vanishing] [--directory docs]

It needs chromium and chromedriver. TensorBoard runs on a free port while the pictures are taken.
"""

import argparse
import io
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from selenium import webdriver
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import ActivationMonitor, BatchNormMonitor, GradientMonitor

WIDTH, HEIGHT = 1280, 800
# Enough for TensorBoard's colours. It keeps a picture below 200 kB.
COLORS = 200


class Regressor(lightning.LightningModule):
    """A net that learns a sine.

    Args:
        net: The net.
        learning_rate: Step size of SGD.
    """

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error of a batch."""
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def mlp(act: Callable[[], nn.Module], depth: int, norm: bool = False, weight_std: float | None = None) -> nn.Sequential:
    """A net of linear layers with 32 units.

    Args:
        act: Makes an activation.
        depth: Number of activations.
        norm: Whether a batch norm layer stands in front of each.
        weight_std: Standard deviation of the initial weights. ``None``: torch's.
    """
    layers: list[nn.Module] = []
    features = 8
    for _ in range(depth):
        linear = nn.Linear(features, 32)
        if weight_std is not None:
            nn.init.normal_(linear.weight, std=weight_std)
        layers += [linear, *([nn.BatchNorm1d(32)] if norm else []), act()]
        features = 32
    return nn.Sequential(*layers, nn.Linear(features, 1))


def dead() -> nn.Module:
    """A net of which one layer is dead, and half of the next one."""
    net = mlp(nn.ReLU, 6)
    with torch.no_grad():
        net[4].bias -= 20
        net[6].bias[:16] -= 20
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "healthy": (lambda: mlp(nn.ReLU, 6, norm=True), 0.05),
    "dead": (dead, 0.05),
    "saturated": (lambda: mlp(nn.Tanh, 6, weight_std=3.0), 0.01),
    "vanishing": (lambda: mlp(nn.Sigmoid, 14), 0.05),
    "diverged": (lambda: mlp(nn.ReLU, 6, weight_std=0.4), 1.0),
}


def train(name: str, directory: Path) -> None:
    """Train one of the nets with all monitors and their warnings.

    Args:
        name: Name of the net.
        directory: Directory of the event file.
    """
    torch.manual_seed(0)
    make, learning_rate = NETS[name]
    net = make()
    x = torch.randn(2000, 8)
    monitors: list[lightning.Callback] = [
        ActivationMonitor(20, warn_dead_above=0.3, warn_saturated_above=0.5),
        GradientMonitor(20, warn_grad_norm_ratio_above=1000.0),
        *([BatchNormMonitor(20, warn_mean_drift_above=1.0)] if name == "healthy" else []),
    ]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=40,
        logger=TensorBoardLogger(directory, name="", version=""),
        callbacks=monitors,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    trainer.fit(Regressor(net, learning_rate), DataLoader(TensorDataset(x, x[:, :1].sin()), 100))


@contextmanager
def tensorboard(directory: Path) -> Iterator[str]:
    """Run TensorBoard on a directory, and yield its address.

    Args:
        directory: The directory.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", directory.name, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--load_fast", "false"], cwd=directory.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/data/runs").read()
                break
            except OSError:
                time.sleep(0.5)
        # It answers before it has read the whole event file.
        time.sleep(5)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    # Otherwise selenium asks the network which ones there are.
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=shutil.which("chromedriver")))
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield driver
    finally:
        driver.quit()


def take(driver: webdriver.Chrome, address: str, tab: str, path: Path) -> None:
    """Take a picture of a tab's first screen.

    Args:
        driver: The browser.
        address: Address of TensorBoard.
        tab: Name of the tab in the address.
        path: The file.
    """
    driver.get(f"{address}/#{tab}")
    # All images and texts are loaded one after the other.
    time.sleep(6)
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--directory", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--tabs", nargs="*", default=["images", "text"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, browser() as driver:
        for name in arguments.only:
            train(name, Path(temporary) / name)
            with tensorboard(Path(temporary) / name) as address:
                for tab in arguments.tabs:
                    take(driver, address, tab, arguments.directory / f"illness_{name}_{tab}.png")


if __name__ == "__main__":
    main()
