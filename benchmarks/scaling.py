"""How the monitors and the synchronised layers scale: what is counted, what is measured, and a model made of both.

    python benchmarks/scaling.py [--modules 10 100 1000 10000] [--ranks 2 3 4 8] [--rounds 5]

- Counted: the collectives of a publication and the bytes that a rank puts into each, on several gloo ranks, and in one
  process that takes itself for one of many; beside the formulas of _traffic.py.
- Measured: the CPU time of a publication's parts on one thread, the file's bytes, the memory of the process.
- Modelled: seconds on a network of a stated latency and bandwidth, by the formulas with which NCCL itself chooses
  between a ring and a tree. No network was measured.

docs/scaling.md reads these tables.
"""

import argparse
import itertools
import math
import pickle
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from _rounds import print_table, run
from _traffic import (
    NUMBER,
    activation_messages,
    all_reduce,
    batch_norm_messages,
    gradient_messages,
    network,
    network_seconds,
    ring_all_gather,
    sync_messages,
)
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlightning.monitors.activations import Activations
from bnlightning.monitors.counting import ranks as _ranks
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey
from bnlightning.monitors.counting.norms import NormAccumulators
from bnlightning.monitors.counting.parameters import ParameterAccumulators
from bnlightning.monitors.gradients import Gradients
from bnlightning.monitors.norms import Norms
from bnlightning.monitors.record import Record
from bnlightning.nn import sync
from bnlightning.writing.history import History
from bnlightning.writing.summaries import summarize
from bnlightning.writing.writers import write

CPU = torch.device("cpu")
# 200 are the monitors' own maxima, beyond which they leave out what is to be watched.
MODULES = [10, 200, 1_000, 100_000]
RANKS = [8, 1_024, 16_384]
# Of what the tables are made of: units of a watched ReLU, channels of a batch norm, values of a parameter.
UNITS, CHANNELS, VALUES = 1024, 256, 1024


# What publishes, with its parts told apart.


@contextmanager
def counting(pretend: bool = False) -> Iterator[list[int]]:
    """The bytes that each collective is called with.

    Args:
        pretend: This process takes itself for one of two ranks, and the other one for one that has nothing to add.
    """
    sent: list[int] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(tensor: Any, *args: Any, **options: Any) -> Any:
            # What is gathered comes first, what this rank has second.
            own = args[0] if name == GATHER else tensor
            sent.append(own.numel() * own.element_size())
            return None if pretend else real(tensor, *args, **options)

        return call

    with ExitStack() as stack:
        for name in ("all_reduce", GATHER):
            stack.enter_context(patch.object(dist, name, counted(name)))
        if pretend:
            stack.enter_context(patch.object(_ranks, "world_size", lambda: 2))
            stack.enter_context(patch.object(dist, "get_rank", lambda: 0))
        yield sent


# By its newer name, where there is that.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
PARTS = {"reduce": "packing", "numbers": "numbers", "queue": "queue", "file": "file's thread"}


class ActivationLoad:
    """``ActivationMonitor`` on so many ReLUs of :data:`UNITS` units."""

    name = "ActivationMonitor"

    def __init__(self, modules: int) -> None:
        torch.manual_seed(0)
        self.keys = [LayerKey(f"network.layers.{index}.act", True, UNITS) for index in range(modules)]
        self.monitor, self.accumulators, self.history = Activations(), LayerAccumulators(), History()
        self.catalogues = self.monitor.catalogues
        self.values = [torch.relu(torch.randn(8, UNITS) * 4.0**scale) for scale in range(-3, 4)]

    @staticmethod
    def messages(modules: int) -> list[int]:
        return activation_messages([(UNITS, False)] * modules)

    def sample(self) -> None:
        self.accumulators.reset()
        for key, values in zip(self.keys, itertools.cycle(self.values), strict=False):
            self.accumulators.update(key, values)

    def reduce(self) -> None:
        self.layers = self.accumulators.reduce(CPU)
        _ranks.first_of_ranks(None, CPU)

    def record(self, step: int) -> Record:
        record = self.monitor.record(step, "train", self.layers)
        self.history.add_record(record, self.catalogues[0].looks())
        return record


class GradientLoad:
    """``GradientMonitor`` on so many sharded parameters of :data:`VALUES` values, each with a histogram."""

    name = "GradientMonitor, sharded"

    def __init__(self, modules: int) -> None:
        torch.manual_seed(0)
        self.parameters = {
            f"network.layers.{index}.weight": nn.Parameter(torch.randn(VALUES // 32, 32)) for index in range(modules)
        }
        gradients = [torch.randn(VALUES // 32, 32) * 4.0**scale for scale in range(-3, 4)]
        for parameter, gradient in zip(self.parameters.values(), itertools.cycle(gradients), strict=False):
            parameter.grad = gradient
        self.monitor = Gradients(max_parameters=modules)
        self.monitor.chosen = dict.fromkeys(self.parameters)
        self.catalogues = self.monitor.catalogues

    @staticmethod
    def messages(modules: int) -> list[int]:
        return gradient_messages(modules, modules, sharded=True)

    def sample(self) -> None:
        self.accumulators = ParameterAccumulators(self.parameters, self.parameters, CPU)
        with torch.no_grad():
            self.accumulators.record(self.parameters.values())
        # As if they were: what each rank has of a DTensor is recorded as here.
        self.accumulators._is_sharded = True

    def reduce(self) -> None:
        with torch.no_grad():
            self.accumulators.finish()

    def record(self, step: int) -> Record:
        return self.monitor.record(step, self.accumulators.statistics())


class NormLoad:
    """``BatchNormMonitor`` on so many layers of :data:`CHANNELS` channels."""

    name = "BatchNormMonitor"

    def __init__(self, modules: int) -> None:
        torch.manual_seed(0)
        self.names = [f"network.layers.{index}.norm" for index in range(modules)]
        layers = [nn.BatchNorm1d(CHANNELS) for _ in self.names]
        for layer in layers:
            layer.num_batches_tracked.add_(1)
        self.accumulators, self.monitor = NormAccumulators(layers, CPU), Norms()
        self.catalogues = self.monitor.catalogues
        self.input = torch.randn(8, CHANNELS)

    @staticmethod
    def messages(modules: int) -> list[int]:
        return batch_norm_messages([CHANNELS] * modules)

    def sample(self) -> None:
        self.accumulators.start()
        for index in range(len(self.names)):
            self.accumulators.update(index, self.input)

    def reduce(self) -> None:
        self.accumulators.reduce()

    def record(self, step: int) -> Record:
        return self.monitor.record(step, dict(zip(self.names, self.accumulators.statistics(), strict=True)))


MONITORS = [ActivationLoad, GradientLoad, NormLoad]


@dataclass
class Measured:
    """Of one monitor and number of modules.

    Args:
        seconds: CPU time of a publication by part, median of the rounds.
        sent: Bytes of each collective.
        written: Bytes that a publication takes in the file.
        memory: Bytes by which the process had grown when it was largest.
    """

    seconds: dict[str, float]
    sent: list[int]
    written: int
    memory: int


def publish(load: Any, step: int, logger: TensorBoardLogger) -> tuple[dict[str, float], list[int]]:
    """CPU seconds of each part, of which the others on the machine are none, and the bytes of each collective."""
    clock = [time.thread_time()]
    with counting(pretend=True) as sent:
        load.reduce()
    clock.append(time.thread_time())
    summaries = summarize(load.record(step), load.catalogues)
    clock.append(time.thread_time())
    everything = time.process_time()
    write([logger], summaries)
    clock.append(time.thread_time())
    # The queue is filled by this thread, the file written by another one.
    logger.experiment.flush()
    others = time.process_time() - everything - (time.thread_time() - clock[2])
    seconds = [end - start for start, end in itertools.pairwise(clock)]
    return dict(zip(PARTS, [*seconds, max(others, 0.0)], strict=True)), sent


def measure_in_process(_: int, monitor: type[Any], modules: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    logger = TensorBoardLogger(folder, name="", version="")
    first = monitor(1)
    first.sample()
    publish(first, 0, logger)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load, found = monitor(modules), []
    # The first one fetches memory.
    for step in range(rounds + 1):
        load.sample()
        size = written(folder)
        seconds, sent = publish(load, step, logger)
        found.append(seconds)
    medians = {part: statistics.median(each[part] for each in found[1:]) for part in PARTS}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    torch.save(vars(Measured(medians, sent, written(folder) - size, grown)), f"{folder}/measured.pt")


def measure(monitor: type[Any], modules: int, rounds: int) -> Measured:
    """In a process of its own, whose memory nobody has used before."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_in_process, (monitor, modules, rounds, folder))
        return Measured(**torch.load(f"{folder}/measured.pt"))


def written(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("events.*"))


# Several ranks.


def messages_on_rank(rank: int, ranks: int, folder: str, modules: Sequence[int]) -> None:
    """What this rank put into the collectives, by monitor and number of modules, as a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found: dict[tuple[str, int], list[int]] = {}
    for monitor, number in itertools.product(MONITORS, modules):
        load = monitor(number)
        load.sample()
        with counting() as sent:
            load.reduce()
        found[monitor.name, number] = sent
    with counting() as sent:
        x = torch.randn(4, CHANNELS, requires_grad=True)
        sync.batch_norm_sync(x, None, None, 1e-5)[0].sum().backward()
    found["sync=True", 1] = sent
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def messages_on_ranks(ranks: int, modules: Sequence[int]) -> dict[tuple[str, int], list[int]]:
    """Of the first rank, which are those of all."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(messages_on_rank, (ranks, folder, modules), nprocs=ranks)
        first, *others = (torch.load(f"{folder}/{rank}.pt") for rank in range(ranks))
        assert all(other == first for other in others)
    return first


# Sums.


def sum_error(ranks: int, dtype: type, tree: bool) -> float:
    """The largest relative error of 1000 sums of one positive number of each rank, in the order of a ring or a tree."""
    x = np.random.default_rng(0).lognormal(size=(ranks, 1000)).astype(dtype)
    exact = np.array([math.fsum(column) for column in x.T.astype(np.float64)])
    if tree:
        while len(x) > 1:
            x = x[::2] + x[1::2]
    else:
        x = np.add.accumulate(x, axis=0)[-1:]
    return float(np.abs(x[0] / exact - 1).max())


def days_until_overflow(values: float, steps_a_second: float, ranks: int) -> float:
    """Days for which a window can count so many values of each rank at each step in an int64."""
    return 2**63 / (values * steps_a_second * ranks) / 86_400


# Tables.


def bytes_of(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def seconds_of(seconds: float) -> str:
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def thousands(number: int) -> str:
    return f"{number:,}".replace(",", " ")


Columns = dict[str, dict[str, str]]


def network_columns() -> Columns:
    """What follows from the formulas alone: bytes, collectives, and the network's seconds."""
    columns: Columns = {name: {} for name in ("collectives", "bytes a rank", *(f"{thousands(p)} ranks" for p in RANKS))}
    for monitor, modules in itertools.product(MONITORS, MODULES):
        messages = monitor.messages(modules)
        row = f"{monitor.name}, {thousands(modules)}"
        columns["collectives"][row] = str(len(messages))
        columns["bytes a rank"][row] = bytes_of(sum(messages))
        for ranks in RANKS:
            columns[f"{thousands(ranks)} ranks"][row] = seconds_of(network_seconds(messages, ranks))
    return columns


def total_columns(largest: dict[str, tuple[int, Measured]]) -> Columns:
    """Seconds that the training waits for a publication: the CPU of rank 0, and the network."""
    columns: Columns = {name: {} for name in ("CPU", *(f"{thousands(ranks)} ranks" for ranks in RANKS))}
    for monitor, modules in itertools.product(MONITORS, MODULES):
        number, measured = largest[monitor.name]
        row = f"{monitor.name}, {thousands(modules)}"
        cpu = modules / number * sum(measured.seconds[part] for part in ("reduce", "numbers", "queue"))
        columns["CPU"][row] = seconds_of(cpu)
        for ranks in RANKS:
            seconds = cpu + network_seconds(monitor.messages(modules), ranks)
            columns[f"{thousands(ranks)} ranks"][row] = seconds_of(seconds)
    return columns


def resnet_channels() -> list[int]:
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    return [layer.num_features for layer in network.modules() if isinstance(layer, _BatchNorm)]


def sync_columns() -> Columns:
    """Of a step of ResNet-50, whose 53 layers wait for each other."""
    channels = resnet_channels()
    parameters = 25_557_032
    names = ["gathered, bytes", "forward, seconds", "backward, seconds", "all gradients, seconds"]
    columns: Columns = {name: {} for name in names}
    for ranks in [8, 64, *RANKS[1:]]:
        messages, on = [sync_messages(each) for each in channels], network(ranks)
        row = f"{thousands(ranks)} ranks"
        columns[names[0]][row] = bytes_of(ranks * sum(forward for forward, _ in messages))
        columns[names[1]][row] = seconds_of(sum(ring_all_gather(forward, ranks, on) for forward, _ in messages))
        columns[names[2]][row] = seconds_of(sum(all_reduce(backward, ranks, on) for _, backward in messages))
        columns[names[3]][row] = seconds_of(all_reduce(4 * parameters, ranks, on))
    return columns


def key_columns(size: Callable[[int], int]) -> Columns:
    """Of a publication before which the ranks differ in what they watch: bytes that every rank takes in.

    Args:
        size: Bytes that so many keys take to be sent.
    """
    cases = {"some ranks lack layers": 0, "a rank has one more": 1, "a rank has 1 000 others": 1000}
    # Rank 0's keys; of each rank a number, and as many bytes as of the one that has most.
    return {
        f"{thousands(ranks)} ranks": {
            case: bytes_of(size(1000) + ranks * (NUMBER + size(more))) for case, more in cases.items()
        }
        for ranks in RANKS
    }


def print_models() -> None:
    print_table("Bytes and network of a publication", "monitor, modules", network_columns())
    print_table("sync=True in all layers of ResNet-50, a step", "ranks", sync_columns())


def print_counted(ranks: Sequence[int], modules: Sequence[int]) -> None:
    columns: Columns = {}
    for number in ranks:
        counted = messages_on_ranks(number, modules)
        cells = {}
        for (name, size), sent in counted.items():
            formula = {m.name: m.messages for m in MONITORS}.get(name, lambda _: sync_messages(CHANNELS))(size)
            same = "as the formula" if sent == formula else f"the formula says {formula}"
            cells[f"{name}, {thousands(size)}"] = f"{len(sent)}: {thousands(sum(sent))} B, {same}"
        columns[f"{number} gloo ranks"] = cells
    print_table("Counted on ranks: collectives, bytes that each rank puts into them", "monitor, modules", columns)


def print_measured(modules: Sequence[int], rounds: int) -> dict[str, tuple[int, Measured]]:
    names = [f"{name}, µs" for name in PARTS.values()]
    names += ["sum but the file's, µs", "file, bytes", "memory, kB", "bytes sent"]
    columns: Columns = {name: {} for name in names}
    largest = {}
    for monitor, number in itertools.product(MONITORS, modules):
        measured = measure(monitor, number, rounds)
        row = f"{monitor.name}, {thousands(number)}"
        for part, name in PARTS.items():
            columns[f"{name}, µs"][row] = f"{measured.seconds[part] / number * 1e6:.1f}"
        waited = sum(measured.seconds[part] for part in ("reduce", "numbers", "queue"))
        columns[names[4]][row] = f"{waited / number * 1e6:.1f}"
        columns["file, bytes"][row] = f"{measured.written / number:.0f}"
        # Of fewer, what else the process does shows.
        columns["memory, kB"][row] = f"{measured.memory / number / 1e3:.0f}" if number >= 1000 else ""
        same = measured.sent == monitor.messages(number)
        columns["bytes sent"][row] = f"{sum(measured.sent) / number:.0f}{'' if same else ', not the formula'}"
        largest[monitor.name] = number, measured
    print_table("Measured in one process, for each module", "monitor, modules", columns)
    return largest


def print_file(largest: dict[str, tuple[int, Measured]]) -> None:
    columns: Columns = {
        f"{thousands(steps)} steps, every_n_steps={every}": {
            f"{name}, 200": bytes_of(200 * steps / every * measured.written / number)
            for name, (number, measured) in largest.items()
        }
        for steps, every in itertools.product((100_000, 1_000_000), (50, 500))
    }
    print_table("The event file of a run", "monitor, modules", columns)


def print_keys() -> None:
    keys = [LayerKey(f"network.layers.{index}.mlp.act", True, UNITS) for index in range(1000)]
    start = time.thread_time()
    repr(keys)
    microseconds = (time.thread_time() - start) / 1000 * 1e6
    print(f"\nThat 1 000 layers are the same on all ranks takes {microseconds:.1f} µs a layer to tell.")
    columns = key_columns(lambda number: len(pickle.dumps(keys[:number])))
    print_table("Layers that differ between ranks: bytes a rank takes in, 1 000 layers on rank 0", "how", columns)


def print_sums() -> None:
    columns = {
        f"{np.dtype(dtype).name}, {order}": {
            thousands(ranks): f"{sum_error(ranks, dtype, order == 'tree'):.0e}" for ranks in (64, *RANKS[1:])
        }
        for dtype in (np.float64, np.float32)
        for order in ("ring", "tree")
    }
    print_table("Largest relative error of a sum of one positive number of each rank", "ranks", columns)
    days = days_until_overflow(256 * 256 * 56 * 56, 10, 16_384)
    print(
        "\nAn int64 holds the counts of a layer of 256 images x 256 channels x 56 x 56 values a step and rank,\n"
        f"on 16 384 ranks, 10 steps a second, for {days:.1f} days in one window: a step, or an evaluation."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, nargs="*", default=[10, 100, 1000, 10_000], help="0.2 MB each")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4, 8], help="0.4 GB each")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, 1 thread, {args.rounds} rounds, CPU time")
    print(f"ReLUs of {UNITS} units, parameters of {VALUES} values, batch norms of {CHANNELS} channels")
    print_models()
    largest = print_measured(args.modules, args.rounds)
    title = "Seconds that the training waits for a publication: CPU of one thread as measured, network as modelled"
    print_table(title, "monitor, modules", total_columns(largest))
    print_file(largest)
    print_keys()
    print_sums()
    print_counted(args.ranks, [number for number in args.modules if number <= 1000])


if __name__ == "__main__":
    run(main, OMP_NUM_THREADS="1")
