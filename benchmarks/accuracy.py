"""How far float32 batch norm is from float64: torch's layer, and ours with either backend.

    python benchmarks/accuracy.py [--draws 5]

In training, on one thread. The variance is the running variance after one step with a momentum of 1, its error the
largest of the channels' relative errors; of all others it is the largest error over the largest true value. The figure
is the worst of the draws. The true values come from the formulas, in float64, of the same float32 input.
"""

import argparse
import platform
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from bnlightning.nn import BatchNorm1d, BatchNorm2d

SHAPES = ["64x16x28x28", "64x16x28x28:channels_last", "200x300"]
# Mean and standard deviation of the input.
INPUTS = [(0, 1), (10, 1), (1e3, 1), (1e4, 1), (1e4, 1e-2)]
COLUMNS = ["variance", "y", "dx", "dweight", "dbias"]
EPS = 1e-5

Tensors = dict[str, Tensor]


def layers(x: Tensor) -> dict[str, nn.Module]:
    builtin, own = (nn.BatchNorm1d, BatchNorm1d) if x.dim() == 2 else (nn.BatchNorm2d, BatchNorm2d)
    makers = {"torch": builtin, "fast": own, "reference": partial(own, backend="reference")}
    with warnings.catch_warnings():
        # A momentum of 1 is what a user would be warned of.
        warnings.filterwarnings("ignore", message=".*momentum.*")
        return {name: make(x.shape[1], momentum=1.0, eps=EPS) for name, make in makers.items()}


def computed(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensors:
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    values = layer.running_var, y.detach(), x.grad, layer.weight.grad, layer.bias.grad
    return dict(zip(COLUMNS, values, strict=True))


def true(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensors:
    """The formulas, on values of one channel a row."""
    x, grad = x.double().transpose(0, 1), grad.double().transpose(0, 1)
    shape, x, grad = x.shape, x.flatten(1), grad.flatten(1)
    weight, bias = weight.double()[:, None], bias.double()[:, None]
    centred = x - x.mean(1, keepdim=True)
    std = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    normalised = centred / std
    slope = (grad * normalised).mean(1, keepdim=True)
    values = {
        "variance": centred.square().sum(1) / (x.shape[1] - 1),
        "y": weight * normalised + bias,
        "dx": weight / std * (grad - grad.mean(1, keepdim=True) - normalised * slope),
        "dweight": (grad * normalised).sum(1),
        "dbias": grad.sum(1),
    }
    for name in ("y", "dx"):
        values[name] = values[name].view(shape).transpose(0, 1)
    return values


def errors(values: Tensors, truth: Tensors) -> Tensor:
    error = {name: (values[name].double() - truth[name]).abs() for name in COLUMNS}
    relative = [error[name].max() / truth[name].abs().max() for name in COLUMNS[1:]]
    return torch.stack([(error["variance"] / truth["variance"]).max(), *relative])


def worst_errors(shape: str, mean: float, std: float, draws: int) -> dict[str, Tensor]:
    """The largest errors, in the order of ``COLUMNS``, by layer."""
    sizes, _, layout = shape.partition(":")
    worst: dict[str, Tensor] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        x, grad = torch.randn(2, *[int(size) for size in sizes.split("x")])
        x, grad = (
            t.contiguous(memory_format=getattr(torch, layout or "contiguous_format")) for t in (x * std + mean, grad)
        )
        weight, bias = torch.randn(2, x.shape[1])
        truth = true(x, weight, bias, grad)
        for name, layer in layers(x).items():
            error = errors(computed(layer, x, weight, bias, grad), truth)
            worst[name] = torch.maximum(worst.get(name, error), error)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread, {args.draws} draws\n")
    print("Error of float32 relative to float64: torch / fast / reference\n")
    print(f"| shape | input | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for shape in SHAPES:
        for mean, std in INPUTS:
            by_layer = torch.stack(list(worst_errors(shape, mean, std, args.draws).values()), dim=1)
            cells = [" / ".join(f"{error:.0e}" for error in column) for column in by_layer.tolist()]
            print(f"| {shape} | N({mean:g}, {std:g}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
