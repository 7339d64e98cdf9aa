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

from bnlightning.compare.figures.style import (
    NONFINITE,
    NOTHING,
    Array,
    Variants,
    by_values,
    in_order,
    log_range,
    seeds_in_words,
    setting_in_words,
    style,
    without_math,
    write_title,
)
from bnlightning.compare.runs import Run

_LINEAR_WEIGHT = re.compile(r"^param_grad_(?:norm|nonfinite)/(.*(?:linear[^.]*|output))\.weight$")


def draw_gradients(
    variants: Variants,
    metric: str,
    title: str,
    notes: Sequence[str],
    *,
    columns: Sequence[str] = ("activation", "depth"),
    rows: str = "norm",
) -> Figure:
    """Draw how large the gradient of each layer's weights is over training.

    Each variant has a heat map of its first run. The rows are layers in forward order, the first layer at the top. A
    colour is the logarithm of ``param_grad_norm/<path>.weight``, which :class:`~bnlightning.GradientMonitor` logs. All
    maps have one scale. A gradient with NaN or infinity is red, one that was not sampled is grey.

    A layer is drawn if its name holds ``linear`` or is ``output``. Over each map stands the norm of the last layer
    divided by that of the first, at the first and at the last sampled step.

    Args:
        variants: The runs of each variant.
        metric: Not drawn.
        title: The title above the figure.
        notes: Not drawn.
        columns: The hyperparameters whose values stand side by side.
        rows: The hyperparameter whose values stand below each other.

    Raises:
        ValueError: If a run lacks one of the hyperparameters, if variants differ in something else, or if no run has
            logged gradients.
    """
    cells = by_values(variants, (rows, *columns))
    maps = {key: _GradientMap.of(runs[0]) for key, runs in cells.items()}
    logs = [gradients.logs for gradients in maps.values()]
    if not any(map(np.size, logs)):
        raise ValueError(
            "no run has param_grad_norm/<path>.weight of a linear layer: train with bnlightning.GradientMonitor."
        )
    scale = Normalize(*log_range(logs))
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
            heading = ", ".join(setting_in_words(name, value) for name, value in zip(columns, values, strict=True))
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
            color = style(label, down)[0]
            figure.text(
                0.22 / width, (y.y0 + y.y1) / 2, setting_in_words(rows, label), color=color, weight="bold", fontsize=12,
                rotation=90, ha="center", va="center",
            )  # fmt: skip
    write_title(figure, title, "gradient of each layer's weights in training" + seeds_in_words("first", variants))
    figure.text(
        0.2 / width, 1 - 0.56 / height,
        "2-norm by layer and training step; over each map the last layer's norm divided by the first layer's, "
        "at the first → at the last sampled step",
        fontsize=10, va="center",
    )  # fmt: skip
    _draw_colour_bar(figure, scale)
    return without_math(figure)


@dataclass(frozen=True)
class _GradientMap:
    """The gradients of one run.

    Args:
        layers: The layers' paths, in forward order.
        steps: The steps at which any layer was sampled, rising.
        logs: The decimal logarithm of each norm, shape ``(layers, steps)``. ``-inf`` is a norm of zero, NaN no sample.
        nonfinite: Whether a gradient held NaN or infinity, shape ``(layers, steps)``.
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
        axes.set_facecolor(NOTHING)
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
        axes.pcolormesh(x, y, red, cmap=ListedColormap([NONFINITE]))
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
    """A sort key: the output comes last, layer 10 behind layer 9."""
    parts = re.split(r"(\d+)", path)
    return path.endswith("output"), [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _edges(steps: NDArray[np.int64]) -> Array:
    """The borders between the steps. The outermost are half a distance beyond the first and the last."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middles, [1.5 * steps[-1] - 0.5 * steps[-2]]])


def _some(layers: int) -> list[int]:
    """The indices of the layers whose names are written: the first, the last and some between."""
    return sorted({round(tick) for tick in np.linspace(0, layers - 1, min(layers, 11))})


def _draw_colour_bar(figure: Figure, scale: Normalize) -> None:
    width, height = figure.get_figwidth(), figure.get_figheight()
    place = figure.add_axes((1 - 1.1 / width, 0.5 / height, 0.17 / width, 1 - 1.85 / height))
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), cax=place, extend="both")
    bar.locator = MaxNLocator(8, integer=True)
    bar.formatter = FuncFormatter(lambda log, _: f"$10^{{{log:.0f}}}$")
    bar.update_ticks()
    bar.set_label("norm of the gradient (red: NaN or infinite)")
