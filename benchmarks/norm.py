"""How long and how much memory a training step of our batch norm layers takes beside torch's layer.

    python benchmarks/norm.py [--rounds 15] [--shapes 10x30 128x64x28x28:channels_last] [--device cpu]

A step is the call of the module and the gradients of its input, weight and bias, on one thread. Every round times each
layer once, in an order that rotates; the figure is the median of the rounds' ratios to torch's layer, with their
quartiles. "over" marks what misses its budget.
"""

import argparse
import math
import platform
import statistics
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from _rounds import Cells, print_table, quartiles, run, turns
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from bnlightning.nn import CONVENTIONS, BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d

SHAPES = ["10x30", "200x300", "64x256x14x14", "128x64x28x28", "128x64x28x28:channels_last"]
# The time budget by the number of elements up to which it holds; memory may never exceed torch's.
TIME_BUDGETS = {10 * 30: 1.40, 200 * 300: 1.25, math.inf: 1.05}
MEMORY_BUDGET = 1.0
BASE = "torch"
# A measurement lasts about this long, so that the clock's own cost and resolution do not count.
SECONDS = 0.05

TITLES = [
    "Time: ratio to torch's, median [quartiles]; budgets 1.40 at 10x30, 1.25 at 200x300, 1.05 above",
    "Time with a ReLU after it: ratio to torch's, median [quartiles]; the same budgets",
    "Peak memory: ratio to torch's (in sizes of the input); budget 1",
    "Peak memory with a ReLU after it: ratio to torch's (in sizes of the input)",
    "Memory kept for the backward pass besides input, parameters and buffers, in sizes of the input",
]
Step = Callable[[], Any]


class ComposedBatchNorm(nn.Module):
    """Batch norm as one would write it down, differentiated by autograd operation by operation."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        channels = [1, -1] + [1] * (x.dim() - 2)
        mean, var = x.mean(dims), x.var(dims, correction=0)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
        self.running_var = 0.9 * self.running_var + 0.1 * var.detach()
        normalised = (x - mean.view(channels)) / (var.view(channels) + 1e-5).sqrt()
        return normalised * self.weight.view(channels) + self.bias.view(channels)


def ours(x: Tensor, convention: str, **options: Any) -> nn.Module:
    named = CONVENTIONS[convention]
    num_features = x[0].numel() if named.per_activation else x.shape[1]
    # Some conventions have no defaults of their own.
    given = {"momentum": 0.1, "eps": 1e-5}
    options |= {name: value for name, value in given.items() if getattr(named, name) is None}
    return (BatchNorm1d if x.dim() == 2 else BatchNorm2d)(num_features, convention=convention, **options)


def torchs(x: Tensor) -> nn.Module:
    return (nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(x.shape[1])


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, dynamic=False, fullgraph=True)


def normalisations(x: Tensor) -> dict[str, nn.Module]:
    layers = {BASE: torchs(x)}
    layers |= {f"ours, {convention}": ours(x, convention) for convention in CONVENTIONS}
    return layers | {
        "reference, pytorch": ours(x, "pytorch", backend="reference"),
        "composed of autograd's operations": ComposedBatchNorm(x.shape[1]),
        "compiled torch": compiled(torchs(x)),
        "compiled ours, keras": compiled(ours(x, "keras")),
        "compiled composed": compiled(ComposedBatchNorm(x.shape[1])),
    }


def with_relu(x: Tensor) -> dict[str, nn.Module]:
    layers = {BASE: torchs(x), "ours, pytorch": ours(x, "pytorch"), "ours, keras": ours(x, "keras")}
    sequences = {name: nn.Sequential(layer, nn.ReLU()) for name, layer in layers.items()}
    fused = BatchNormAct1d if x.dim() == 2 else BatchNormAct2d
    sequences["ours, keras, fused"] = fused(x.shape[1], convention="keras")
    in_place = {"torch, in place": torchs(x), "ours, keras, in place": ours(x, "keras")}
    sequences |= {name: nn.Sequential(layer, nn.ReLU(inplace=True)) for name, layer in in_place.items()}
    return sequences | {
        "compiled torch": compiled(nn.Sequential(torchs(x), nn.ReLU())),
        "compiled ours, keras": compiled(nn.Sequential(ours(x, "keras"), nn.ReLU())),
    }


def make_input(shape: str, device: str) -> Tensor:
    sizes, _, layout = shape.partition(":")
    x = torch.randn([int(size) for size in sizes.split("x")], device=device)
    return x.to(memory_format=getattr(torch, layout or "contiguous_format")).requires_grad_()


def training_step(layer: nn.Module, x: Tensor) -> Step:
    inputs, grad_output = [x, *layer.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x), inputs, grad_output)


def times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, one figure a round. The first call compiles; the timer waits for a CUDA device."""
    for step in steps.values():
        step()
    timers = {name: Timer("step()", globals={"step": step}, num_threads=1) for name, step in steps.items()}
    numbers = {name: max(1, round(SECONDS / timer.timeit(5).mean)) for name, timer in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in turns(steps, rounds):
        seconds[name].append(timers[name].timeit(numbers[name]).mean)
    return seconds


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that was allocated at once during the step, beyond what existed before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass besides the input, the parameters and the buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters(), *layer.buffers()]}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del output
    return sum(size for address, size in storages.items() if address not in known)


def time_cells(steps: dict[str, Step], rounds: int, budget: float) -> Cells:
    seconds = times(steps, rounds)
    cells = {BASE: f"1 ({statistics.median(seconds[BASE]) * 1e6:.3g} µs)"}
    for name in list(steps)[1:]:
        low, ratio, high = quartiles(seconds[name], seconds[BASE])
        cells[name] = f"{ratio:.2f} [{low:.2f}, {high:.2f}]{mark(name, ratio, budget)}"
    return cells


def memory_cells(peaks: dict[str, int], size: int) -> Cells:
    ratios = {name: peak / peaks[BASE] for name, peak in peaks.items()}
    return {
        name: f"{ratio:.3f} ({peaks[name] / size:.2f}){mark(name, ratio, MEMORY_BUDGET)}"
        for name, ratio in ratios.items()
    }


def mark(name: str, ratio: float, budget: float) -> str:
    return " over" if name.startswith("ours") and round(ratio, 3) > budget else ""


def measure(shape: str, device: str, rounds: int) -> list[Cells]:
    """One column of each table."""
    # Each shape is compiled by itself, instead of one kernel for all.
    torch._dynamo.reset()
    x = make_input(shape, device)
    size = x.untyped_storage().nbytes()
    budget = next(budget for elements, budget in TIME_BUDGETS.items() if x.numel() <= elements)
    layers = {name: layer.to(device) for name, layer in normalisations(x).items()}
    steps = {name: training_step(layer, x) for name, layer in layers.items()}
    relu_steps = {name: training_step(layer.to(device), x) for name, layer in with_relu(x).items()}
    return [
        time_cells(steps, rounds, budget),
        time_cells(relu_steps, rounds, budget),
        memory_cells({name: peak_bytes(step, device) for name, step in steps.items()}, size),
        memory_cells({name: peak_bytes(step, device) for name, step in relu_steps.items()}, size),
        {name: f"{saved_bytes(layer, x) / size:.3f}" for name, layer in layers.items()},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxC or NxCxHxW, with or without :channels_last")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    # Set before anything is compiled: compiled kernels keep the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} thread, {args.rounds} rounds")
    columns = [measure(shape, args.device, args.rounds) for shape in args.shapes]
    for title, tables in zip(TITLES, zip(*columns, strict=True), strict=True):
        print_table(title, "layer", dict(zip(args.shapes, tables, strict=True)))


if __name__ == "__main__":
    run(main)
