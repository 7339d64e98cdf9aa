"""The figure of a sweep that shows how large the gradient of each layer is over training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from bnlightning.compare.figures.style import Array, Variants, by_values, in_order, look, named, of_seeds, write_title
from bnlightning.compare.runs import Run

_LINEAR_WEIGHT = re.compile(r"^param_grad_(?:norm|nonfinite)/(.*(?:linear[^.]*|output))\.weight$")
# Below are zeros and underflow, above the last steps before an overflow.
_TYPICAL = (0.01, 0.99)
# To each side of the median: more of them, as of a run that overflows, would leave one colour to all others.
_DECADES = 6
# As in TensorBoard's pictures of activations.
_NONFINITE = "#e3001b"
_NOTHING = "#d4d4d4"


def draw_gradients(
    variants: Variants,
    metric: str,
    title: str,
    notes: Sequence[str],
    *,
    columns: Sequence[str] = ("activation", "depth"),
    rows: str = "norm",
) -> Figure:
    """Draw how large the gradient of each layer's weights is over training: a heat map for each variant's first run.

    From ``param_grad_norm/<path>.weight`` as :class:`~bnlightning.GradientMonitor` logs it, for layers whose name holds
    ``linear`` or is ``output``, in forward order, the first layer at the top. Colours are the logarithm of the norm, on
    one scale for all; a gradient with NaN or infinity is red, one that was not sampled grey. Over each map stands the
    norm of the last layer over that of the first, at the first and at the last sampled step.

    Args:
        variants: The runs of each variant.
        metric: Not drawn.
        title: Stands above.
        notes: Not drawn.
        columns: The hyperparameters that tell maps side by side apart.
        rows: The hyperparameter that tells maps below each other apart.

    Raises:
        ValueError: If a run lacks one of the hyperparameters, variants differ in something else, or no run has logged
            gradients.
    """
    cells = by_values(variants, (rows, *columns))
    maps = {key: _GradientMap.of(runs[0]) for key, runs in cells.items()}
    logs = [gradients.logs for gradients in maps.values()]
    if not any(map(np.size, logs)):
        raise ValueError(
            "no run has param_grad_norm/<path>.weight of a linear layer: train with bnlightning.GradientMonitor."
        )
    scale = _common_scale(logs)
    across, down = in_order(key[1:] for key in cells), in_order(key[0] for key in cells)
    tallest = max(len(gradients.layers) for gradients in maps.values())
    cell_height = 0.75 + min(max(0.115 * tallest, 1.3), 4.0)
    width, height = max(3.3 * len(across) + 2.4, 10.0), cell_height * len(down) + 1.55
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    page = figure.add_gridspec(
        len(down), len(across), left=1.05 / width, right=1 - 1.35 / width, top=1 - 1.35 / height, bottom=0.5 / height,
        wspace=0.3, hspace=0.62 / (cell_height - 0.62),
    )  # fmt: skip
    for (label, *values), gradients in maps.items():
        row, column = down.index(label), across.index(tuple(values))
        axes = figure.add_subplot(page[row, column])
        gradients.draw(axes, scale)
        if row == len(down) - 1:
            axes.set_xlabel("training step", fontsize=10)
        if row == 0:
            heading = ", ".join(named(name, value) for name, value in zip(columns, values, strict=True))
            axes.text(
                0.5,
                1 + 0.4 / (cell_height - 0.62),
                heading,
                weight="bold",
                fontsize=12,
                ha="center",
                transform=axes.transAxes,
            )
        if column == 0:
            y = page[row, 0].get_position(figure)
            color = look(label, down)[0]
            figure.text(
                0.22 / width, (y.y0 + y.y1) / 2, named(rows, label), color=color, weight="bold", fontsize=12,
                rotation=90, ha="center", va="center",
            )  # fmt: skip
    write_title(figure, title, "gradient of each layer's weights in training" + of_seeds("first", variants))
    figure.text(
        0.2 / width, 1 - 0.56 / height,
        "2-norm by layer and training step; over each map the last layer's norm divided by the first layer's, "
        "at the first → at the last sampled step",
        fontsize=10, va="center",
    )  # fmt: skip
    _draw_colour_bar(figure, scale)
    return figure


@dataclass(frozen=True)
class _GradientMap:
    """The gradients of one run.

    Args:
        layers: Names, in forward order.
        steps: Where any was sampled, rising.
        logs: The decimal logarithm of each norm, shape ``(layers, steps)``: ``-inf`` for zero, NaN for none.
        nonfinite: Where a gradient held NaN or infinity, the same shape.
    """

    layers: list[str]
    steps: NDArray[np.int64]
    logs: Array
    nonfinite: NDArray[np.bool_]

    @classmethod
    def of(cls, run: Run) -> "_GradientMap":
        paths = {match[1] for tag in run.scalars if (match := _LINEAR_WEIGHT.match(tag))}
        layers = sorted(paths, key=_forward_order)
        logged = [
            [_by_step(run, f"param_grad_{what}/{layer}.weight") for layer in layers] for what in ("norm", "nonfinite")
        ]
        steps = sorted({step for kind in logged for by_step in kind for step in by_step})
        norms, nonfinite = (
            np.array([[by_step.get(step, np.nan) for step in steps] for by_step in kind]) for kind in logged
        )
        with np.errstate(divide="ignore"):
            return cls(layers, np.array(steps), np.log10(norms), nonfinite > 0)

    def draw(self, axes: Axes, scale: Normalize) -> None:
        axes.set_facecolor(_NOTHING)
        if not self.layers:
            axes.text(0.5, 0.5, "no gradients logged", ha="center", va="center", transform=axes.transAxes)
            axes.set_xticks([])
            axes.set_yticks([])
            return
        x, y = _edges(self.steps), np.arange(len(self.layers) + 1) - 0.5
        # Zero gets the colour of what is below the scale; matplotlib would leave out an infinity.
        below = np.where(np.isneginf(self.logs), float(scale.vmin or 0.0) - 1, self.logs)
        shown = np.ma.masked_array(below, np.isnan(self.logs) | self.nonfinite)
        axes.pcolormesh(x, y, shown, cmap="viridis", norm=scale)
        red = np.ma.masked_array(np.ones_like(self.logs), ~self.nonfinite)
        axes.pcolormesh(x, y, red, cmap=ListedColormap([_NONFINITE]))
        axes.set_ylim(len(self.layers) - 0.5, -0.5)
        ticks = _some(len(self.layers))
        axes.set_yticks(ticks, [self.layers[tick].rpartition(".")[2] for tick in ticks], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(axis="x", labelsize=8.5)
        axes.set_title(f"last/first layer: {self.ratio(0)} → {self.ratio(-1)}", fontsize=9.5, pad=3)

    def ratio(self, column: int) -> str:
        """The norm of the last layer over that of the first, at one of the steps."""
        first, last = self.logs[0, column], self.logs[-1, column]
        if self.nonfinite[[0, -1], column].any():
            return "NaN"
        if np.isnan(last - first):
            return "-"
        return f"{10.0 ** (last - first):.2g}"


def _by_step(run: Run, tag: str) -> dict[int, float]:
    return dict(zip(*(part.tolist() for part in run.scalars[tag]), strict=True)) if tag in run.scalars else {}


def _forward_order(path: str) -> tuple[bool, list[Any]]:
    """The output last, and of numbered layers the tenth behind the ninth."""
    parts = re.split(r"(\d+)", path)
    return path.endswith("output"), [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _edges(steps: NDArray[np.int64]) -> Array:
    """Borders between the steps, half a distance beyond the first and the last."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middles, [1.5 * steps[-1] - 0.5 * steps[-2]]])


def _some(layers: int) -> list[int]:
    """Which layers have their name written: the first, the last and some between."""
    return sorted({round(tick) for tick in np.linspace(0, layers - 1, min(layers, 11))})


def _common_scale(logs: Sequence[Array]) -> Normalize:
    finite = np.concatenate([values[np.isfinite(values)] for values in logs])
    if not len(finite):
        return Normalize(-1.0, 1.0)
    middle = np.median(finite)
    low, high = np.clip(np.quantile(finite, _TYPICAL), middle - _DECADES, middle + _DECADES)
    return Normalize(float(low), float(max(high, low + 1)))


def _draw_colour_bar(figure: Figure, scale: Normalize) -> None:
    width, height = figure.get_figwidth(), figure.get_figheight()
    place = figure.add_axes((1 - 1.1 / width, 0.5 / height, 0.17 / width, 1 - 1.85 / height))
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), cax=place, extend="both")
    bar.locator = MaxNLocator(8, integer=True)
    bar.formatter = FuncFormatter(lambda log, _: f"$10^{{{log:.0f}}}$")
    bar.update_ticks()
    bar.set_label("norm of the gradient (red: NaN or infinite)")
