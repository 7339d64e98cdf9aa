"""What an epoch of the MNIST classifier takes through Lightning, with and without monitors, beside a bare loop.

    BNLIGHTNING_DATA_DIR=DIRECTORY python benchmarks/mnist.py [--epochs 20] [--rounds 3] [--threads 1]

Every case is a whole training of so many epochs, an evaluation of 5000 images after each: 784-300-100-10, ELU, batch
normalisation on every layer, batches of 200, plain SGD. The figure is the time of a training divided by its epochs, and
the median of the rounds' ratios to the bare loop over the same tensors. The monitors' pictures are part of it.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import lightning
import torch
from _rounds import Cells, print_table, quartiles, run, turns
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from bnlightning import ActivationMonitor, BatchNormMonitor, GradientMonitor, LitClassifier, MNISTDataModule

BUDGET = 1.25
BASE = "bare loop over tensors"
EVERY = 50


def make_model(kind: type[LitClassifier] = LitClassifier) -> LitClassifier:
    torch.manual_seed(0)
    return kind(norm_options={"eps": 1e-3, "momentum": 0.1, "convention": "keras"})


def bare(epochs: int) -> None:
    """A loop as anybody would write it, over the DataModule's tensors in its order."""
    data, model = MNISTDataModule(), make_model()
    data.setup("fit")
    optimizer = model.configure_optimizers()
    (x, y), (val_x, val_y) = data.train_set, data.val_set
    for epoch in range(epochs):
        model.train()
        for index in data.order(epoch).split(data.batch_size):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        evaluate(model, zip(val_x.split(1000), val_y.split(1000), strict=True))


def dataset_and_loader(epochs: int) -> None:
    """The same loop over torchvision's dataset through a DataLoader, as most tutorials have it."""
    model = make_model()
    optimizer = model.configure_optimizers()
    images = MNIST(MNISTDataModule().directory.parents[1], train=True, transform=transforms.ToTensor())
    train = DataLoader(Subset(images, range(5000, 60000)), batch_size=200, shuffle=True)
    val = DataLoader(Subset(images, range(5000)), batch_size=1000)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        evaluate(model, val)


def evaluate(model: LitClassifier, batches) -> float:
    model.eval()
    with torch.no_grad():
        return sum((model(x).argmax(dim=1) == y).sum().item() for x, y in batches)


class Silent(LitClassifier):
    """What Lightning itself takes: the same training, of which nothing is logged."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.val_acc(self(x), y)


def through_lightning(
    make_callbacks: Callable[[], list[Callback]], kind: type[LitClassifier] = LitClassifier, logs: bool = True
) -> Callable[[int], None]:
    def train(epochs: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                logger=TensorBoardLogger(directory) if logs else False,
                callbacks=make_callbacks(),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
            trainer.fit(make_model(kind), MNISTDataModule())

    return train


CASES: dict[str, Callable[[int], None]] = {
    BASE: bare,
    "Lightning without any logging": through_lightning(list, Silent, logs=False),
    "Lightning": through_lightning(list),
    f"Lightning, ActivationMonitor every {EVERY} steps": through_lightning(lambda: [ActivationMonitor(EVERY)]),
    f"Lightning, all monitors every {EVERY} steps": through_lightning(
        lambda: [ActivationMonitor(EVERY), GradientMonitor(EVERY), BatchNormMonitor(EVERY)]
    ),
}
SLOW = "bare loop over torchvision's dataset, DataLoader"


def seconds(train: Callable[[int], None], epochs: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        train(epochs)
        return (time.perf_counter() - start) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    MNISTDataModule().prepare_data()
    for train in CASES.values():
        seconds(train, 1)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for name in turns(CASES, arguments.rounds):
        times[name].append(seconds(CASES[name], arguments.epochs))
    # It varies little, and takes its time.
    times[SLOW] = [seconds(dataset_and_loader, 1)] * arguments.rounds
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}, {arguments.threads} "
        f"thread(s), {arguments.rounds} rounds of {arguments.epochs} epochs"
    )
    print_table(
        f"An epoch of 275 steps with its evaluation; budget {BUDGET} for all monitors",
        "training",
        {"seconds": row(times, lambda own: f"{statistics.median(own):.3f}"), "ratio": row(times, ratio(times[BASE]))},
    )


def row(times: dict[str, list[float]], text: Callable[[list[float]], str]) -> Cells:
    return {name: text(own) for name, own in times.items()}


def ratio(base: list[float]) -> Callable[[list[float]], str]:
    def text(own: list[float]) -> str:
        if own is base:
            return "1"
        low, median, high = quartiles(own, base)
        return f"{median:.2f} [{low:.2f}, {high:.2f}]"

    return text


if __name__ == "__main__":
    run(main)
