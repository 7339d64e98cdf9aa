"""What monitors add to a training step: time and bytes, beside what people write into hooks of their own.

    python benchmarks/monitors.py [--rounds 15] [--cases MLP ResNet-18] [--device cpu] [--clock wall]

A step is a batch of a fit by Lightning, from the first callback's on_train_batch_start to the last one's
on_train_batch_end, on one thread. All fits of a case train one set of weights, each through modules of its own, in
threads that wait for each other: every round lets each take some steps, in an order that rotates. The figure is the
median of the rounds' ratios to a fit without a callback, with their quartiles, and the median difference. "over" marks
what misses its budget.

The event file has a thread of its own, which writes after the step what the step put into a queue. It is waited for
before the next step begins, so that it slows down none; in a training it would share the interpreter with the steps
that follow.
"""

import argparse
import copy
import itertools
import logging
import math
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from _rounds import Cells, print_table, quartiles, run, turns
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlightning import ActivationMonitor, BatchNormMonitor, GradientMonitor

IDLE_BUDGET = 1.01
BASE = "without"
# A fit takes its turn for about this long, so that neither switching nor the clock counts.
SECONDS = 0.02
# A difference of a hundredth takes more rounds than one of a tenth.
IDLE_ROUNDS = 3
WARM_UP = 3
NEVER = 10**9

PARTS = ["hooks", "publication", "file"]
"""What a sampled step is made of; each includes the ones before."""
TITLES = {
    "hooks": "A step that is sampled: the hooks during the step. Ratio to the same step without; budgets {}",
    "publication": "The same with the publication at its end (reduce, statistics, queue): what the training waits for",
    "file": "The same with the time until the event file is written, as if nothing went on beside it",
    "idle": f"A step between samples: ratio to a step without; budget {IDLE_BUDGET}",
    "bytes": "Bytes a sample takes in the event file: in total / for each layer (or other name in a tag)",
    "depth": "Blocks of a linear layer and a ReLU, 16 features, batch 32: µs a block {}",
    "width": "One ReLU between two linear layers, batch 200: µs {} (and ns an element of its output, with publication)",
}
SPLIT = "that sampling adds to a step, hooks / with publication / with the file"
DEPTHS = [10, 100, 1000]
WIDTHS = [64, 1024, 16384]
WIDE_BATCH = 200

Batch = tuple[Tensor, Tensor]
MakeCallback = Callable[[int], Callback]


class NaiveHook(Callback):
    """A forward hook on every activation and normalisation that writes at once."""

    def __init__(self, write: Callable[[Any, str, Tensor, int], None]) -> None:
        self.write = write

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        writer = trainer.logger.experiment
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.ReLU | _BatchNorm):
                module.register_forward_hook(
                    lambda module, args, output, name=name: self.write(writer, name, output, trainer.global_step)
                )


def write_histogram(writer: Any, name: str, output: Tensor, step: int) -> None:
    # TensorBoard's writer knows no bfloat16.
    writer.add_histogram(f"hist/{name}", output.detach().float(), step)


def write_items(writer: Any, name: str, output: Tensor, step: int) -> None:
    for statistic in ("mean", "std", "min", "max"):
        writer.add_scalar(f"{statistic}/{name}", getattr(output, statistic)().item(), step)


# Each takes how many steps lie between two samples.
MONITORS: dict[str, MakeCallback] = {
    "ActivationMonitor": partial(ActivationMonitor, max_layers=NEVER),
    "ActivationMonitor, no check for NaN": partial(
        ActivationMonitor, max_layers=NEVER, check_finite_every_n_steps=None
    ),
    "ActivationMonitor, output_gradients": partial(ActivationMonitor, max_layers=NEVER, output_gradients=True),
    "GradientMonitor": partial(GradientMonitor, max_parameters=NEVER),
    "BatchNormMonitor": partial(BatchNormMonitor, max_layers=NEVER),
}
NAIVE: dict[str, MakeCallback] = {
    "hook with add_histogram": lambda every: NaiveHook(write_histogram),
    "hook with .item() mean, std, min, max": lambda every: NaiveHook(write_items),
}


@dataclass
class Case:
    """A network and what it is trained on.

    Args:
        network: Makes it.
        shape: Of a batch.
        classes: How many.
        budget: Of a sampled step.
        precision: The Trainer's.
        channels_last: Whether images and kernels are.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    budget: float = math.inf
    precision: str = "32-true"
    channels_last: bool = False

    def make(self, device: str) -> tuple[nn.Module, Batch]:
        network, x = self.network().to(device), torch.randn(self.shape, device=device)
        if self.channels_last:
            network, x = (each.to(memory_format=torch.channels_last) for each in (network, x))
        return network, (x, torch.randint(self.classes, self.shape[:1], device=device))


def mlp(norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for features, units in [(784, 300), (300, 100)]:
        layers += [nn.Linear(features, units), *([norm(units)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def deep(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(blocks) for layer in (nn.Linear(16, 16), nn.ReLU())))


def wide(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, features), nn.ReLU(), nn.Linear(features, 10))


CASES = {
    "MLP": Case(mlp, (200, 784), budget=1.15),
    "MLP, BatchNorm1d": Case(partial(mlp, nn.BatchNorm1d), (200, 784), budget=1.15),
    "ResNet-18": Case(partial(torchvision.models.resnet18, num_classes=10), (16, 3, 64, 64), budget=1.10),
    "ResNet-50": Case(
        torchvision.models.resnet50, (256, 3, 224, 224), 1000, 1.10, precision="bf16-mixed", channels_last=True
    ),
}
CASES_ON = {"cpu": ["MLP", "MLP, BatchNorm1d", "ResNet-18"], "cuda": list(CASES)}


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.network(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Setting:
    """How it is measured.

    Args:
        device: Of the networks.
        clock: Of :data:`CLOCKS`.
        rounds: How many.
    """

    device: str
    clock: str
    rounds: int

    def now(self) -> float:
        """In seconds, when all that was begun on the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return CLOCKS[self.clock]()


class First(Callback):
    """Before the callback that is measured: when a step begins, and when all but the callbacks is done."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = self.now()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.computed = self.now()


class Last(Callback):
    """Behind it: notes how long the step took, and waits until it is told to go on."""

    def __init__(self, first: First) -> None:
        self.first = first
        self.left = 1
        self.steps: list[dict[str, float]] = []
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        published = self.first.now()
        trainer.logger.experiment.flush()
        ends = self.first.computed, published, self.first.now()
        self.steps.append({part: end - self.first.start for part, end in zip(PARTS, ends, strict=True)})
        self.left -= 1
        if not self.left:
            self.done.release()
            self.go.acquire()


class Fit:
    """A fit in a thread of its own, which takes a step and waits, and takes further ones when it is told to."""

    def __init__(
        self,
        case: Case,
        network: nn.Module,
        batch: Batch,
        callback: Callback | None,
        folder: str,
        now: Callable[[], float],
    ) -> None:
        # Modules of its own, for hooks of its own, but everybody's tensors: where they lie in memory matters.
        tensors = itertools.chain(network.parameters(), network.buffers())
        self._module = Classifier(copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}))
        self._batch = batch
        self._logger = TensorBoardLogger(folder, name=None, version="")
        first = First(now)
        self._last = Last(first)
        self._trainer = lightning.Trainer(
            accelerator="gpu" if batch[0].is_cuda else "cpu",
            devices=1,
            precision=case.precision,
            max_epochs=-1,
            logger=self._logger,
            log_every_n_steps=NEVER,
            callbacks=[first, *([callback] if callback else []), self._last],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        self._wait()

    def run(self, steps: int) -> dict[str, float]:
        """Take some steps: mean seconds of one, up to the end of each of :data:`PARTS`."""
        self._last.left = steps
        self._last.steps.clear()
        self._last.go.release()
        self._wait()
        return {part: statistics.fmean(step[part] for step in self._last.steps) for part in PARTS}

    def close(self) -> None:
        self._trainer.should_stop = True
        self._last.go.release()
        self._thread.join()

    def size(self) -> int:
        """Bytes written so far."""
        return sum(file.stat().st_size for file in self._files())

    def names(self) -> set[str]:
        """What stands behind the families in the tags."""
        events = (event for file in self._files() for event in EventFileLoader(str(file)).Load())
        tags = {value.tag for event in events for value in event.summary.value}
        return {name for family, _, name in (tag.partition("/") for tag in tags) if name and family != "health"}

    def _files(self) -> list[Path]:
        return list(Path(self._logger.log_dir).glob("events.*"))

    def _fit(self) -> None:
        try:
            self._trainer.fit(self._module, itertools.repeat(self._batch))
        except BaseException as error:
            self._error = error
        finally:
            self._last.done.release()

    def _wait(self) -> None:
        self._last.done.acquire()
        if self._error is not None:
            raise self._error


Seconds = dict[str, dict[str, list[float]]]
"""By fit and part, one figure a round."""


@contextmanager
def fits(case: Case, watching: dict[str, Callback | None], setting: Setting) -> Iterator[dict[str, Fit]]:
    """Fits of one network, which have taken their first steps."""
    network, batch = case.make(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: Fit(case, network, batch, callback, f"{folder}/{index}", setting.now)
            for index, (name, callback) in enumerate(watching.items())
        }
        for fit in running.values():
            fit.run(WARM_UP)
        yield running
        for fit in running.values():
            fit.close()


def times(running: dict[str, Fit], rounds: int) -> Seconds:
    steps = max(1, round(SECONDS / running[BASE].run(WARM_UP)["publication"]))
    seconds: Seconds = {name: {part: [] for part in PARTS} for name in running}
    for name in turns(running, rounds):
        for part, mean in running[name].run(steps).items():
            seconds[name][part].append(mean)
    return seconds


def callbacks(case: Case, makers: dict[str, MakeCallback], every: int) -> dict[str, Callback]:
    """Those that have something to look at."""
    normalises = any(isinstance(module, _BatchNorm) for module in case.network().modules())
    return {name: make(every) for name, make in makers.items() if normalises or name != "BatchNormMonitor"}


def sampling(case: Case) -> dict[str, Callback | None]:
    return {BASE: None, **callbacks(case, MONITORS | NAIVE, every=1)}


def plain(seconds: Seconds, part: str) -> list[float]:
    """Without a callback; there is nothing to write."""
    return seconds[BASE]["hooks" if part == "hooks" else "publication"]


def median_extra(seconds: Seconds, name: str, part: str) -> float:
    """Seconds by which a step takes longer."""
    return statistics.median(a - b for a, b in zip(seconds[name][part], plain(seconds, part), strict=True))


def ratio_cells(seconds: Seconds, part: str, budget: float) -> Cells:
    cells = {BASE: f"1 ({statistics.median(plain(seconds, part)) * 1e6:.0f} µs)"}
    for name in list(seconds)[1:]:
        low, ratio, high = quartiles(seconds[name][part], plain(seconds, part))
        mark = " over" if name in MONITORS and round(ratio, 3) > budget else ""
        extra = median_extra(seconds, name, part) * 1e6
        cells[name] = f"{ratio:.3f} [{low:.3f}, {high:.3f}] ({extra:+.0f} µs){mark}"
    return cells


def byte_cells(running: dict[str, Fit]) -> Cells:
    cells = {}
    for name, fit in running.items():
        before = fit.size()
        fit.run(WARM_UP)
        sample = (fit.size() - before) / WARM_UP
        names = len(fit.names())
        cells[name] = f"{sample:.0f} / {sample / names:.0f}" if sample and names else "0"
    del cells[BASE]
    return cells


def measure(case: Case, setting: Setting) -> dict[str, Cells]:
    """One column of each table of ratios."""
    with fits(case, sampling(case), setting) as running:
        seconds = times(running, setting.rounds)
        columns = {part: ratio_cells(seconds, part, case.budget) for part in PARTS}
        columns["bytes"] = byte_cells(running)
    # The first of these tells how exact the figures are, the second what Lightning takes to call any callback.
    idle = {BASE: None, "without, again": None, "a callback that does nothing": Callback()}
    idle |= callbacks(case, MONITORS, NEVER)
    with fits(case, idle, setting) as running:
        seconds = times(running, IDLE_ROUNDS * setting.rounds)
    # What publishes nothing has nothing to be written, either.
    return columns | {"idle": ratio_cells(seconds, "publication", IDLE_BUDGET)}


def growth(case: Case, setting: Setting, describe: Callable[[list[float]], str]) -> Cells:
    """A column of a table of seconds that a sampled step takes longer, up to the end of each part."""
    with fits(case, sampling(case), setting) as running:
        seconds = times(running, setting.rounds)
    return {name: describe([median_extra(seconds, name, part) for part in PARTS]) for name in list(seconds)[1:]}


def joined(extra: list[float], unit: float) -> str:
    return " / ".join(f"{part / unit:.1f}" for part in extra)


def deep_column(blocks: int, setting: Setting) -> Cells:
    case = Case(partial(deep, blocks), (32, 16))
    return growth(case, setting, lambda extra: joined(extra, 1e-6 * blocks))


def wide_column(features: int, setting: Setting) -> Cells:
    case = Case(partial(wide, features), (WIDE_BATCH, 16))
    elements = WIDE_BATCH * features
    return growth(
        case,
        setting,
        lambda extra: f"{joined(extra, 1e-6)} ({extra[PARTS.index('publication')] * 1e9 / elements:.1f} ns)",
    )


def print_growth(setting: Setting) -> None:
    columns = {f"{blocks} blocks": deep_column(blocks, setting) for blocks in DEPTHS}
    print_table(TITLES["depth"].format(SPLIT), "monitor", columns)
    columns = {f"{features} features": wide_column(features, setting) for features in WIDTHS}
    print_table(TITLES["width"].format(SPLIT), "monitor", columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="at least 2; three times as many between samples")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="by default all that suit the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of the process, where others run, too")
    args = parser.parse_args()
    setting = Setting(args.device, args.clock, args.rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {where}, 1 thread, ", end="")
    print(f"{args.rounds} rounds, {args.clock} time")
    cases = {name: CASES[name] for name in args.cases or CASES_ON[args.device]}
    tables = {name: measure(case, setting) for name, case in cases.items()}
    budgets = ", ".join(f"{case.budget:.2f} for {name}" for name, case in cases.items())
    for title in [*PARTS, "idle", "bytes"]:
        columns = {name: columns[title] for name, columns in tables.items()}
        print_table(TITLES[title].format(budgets), "monitor", columns)
    print_growth(replace(setting, rounds=max(3, args.rounds // 3)))


if __name__ == "__main__":
    # Every thread takes its number of threads from here.
    run(main, OMP_NUM_THREADS="1")
