"""Figures for sweeps: what :func:`~bnlightning.compare_runs` draws instead of its own, if given as its ``draw``.

Each is called with the runs of each variant, the metric, a title and the notes, and with options of its own; it draws
from the runs alone and leaves the notes to the tables. Hyperparameters are those a run's ``hparams.yaml`` holds, nested
ones by their path, such as ``norm_options.momentum``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from bnlightning._check import check_integer
from bnlightning.compare.figures.overview import in_words, set_value_limits, style, value_range
from bnlightning.compare.runs import Run, curves, is_higher_better, quartiles, worst

Variants = Mapping[str, Sequence[Run]]
Array = NDArray[np.float64]

_NAMES = {"weight_std": "standard deviation of the initial weights", "eps": "epsilon"}
_SHORT_NAMES = {"weight_std": "std"}
# In the order in which they are drawn.
_NORMALIZATIONS = {"none": "without batch norm", "custom": "batch norm (custom)", "torch": "batch norm (torch)"}
_MOST_TICKS = 12
# Below are zeros and underflow, above the last steps before an overflow.
_TYPICAL = (0.01, 0.99)
# To each side of the median: more of them, as of a run that overflows, would leave one colour to all others.
_DECADES = 6
# As in TensorBoard's pictures of activations.
_NONFINITE = "#e3001b"
_NOTHING = "#d4d4d4"
_LINEAR_WEIGHT = re.compile(r"^param_grad_(?:norm|nonfinite)/(.*(?:linear[^.]*|output))\.weight$")


def draw_parameter(
    variants: Variants, metric: str, title: str, notes: Sequence[str], *, parameter: str, group: str = "norm"
) -> Figure:
    """Draw how good the runs are at the end against one hyperparameter, a line for each value of another.

    Points are medians of the last value of ``metric`` over the seeds, bars reach to the quartiles. A run that diverged
    counts as worse than any other, so that a point is missing where half of them did; crosses above the axes say where
    and how many. A triangle at the upper edge is a value beyond it.

    Args:
        variants: The runs of each variant.
        metric: The tag of a loss or of an accuracy.
        title: Stands above.
        notes: Not drawn.
        parameter: The hyperparameter along the horizontal axis: numbers; logarithmic if all are positive.
        group: The hyperparameter that tells the lines apart.

    Raises:
        ValueError: If a run lacks one of the two hyperparameters, ``parameter`` is not a number, or variants differ in
            something else.
    """
    cells = _by_values(variants, (group, parameter))
    for _, value in cells:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"parameter={parameter!r} is not possible: {value!r} is no number. Choose another one.")
    lines = {
        label: _Results.of({value: runs for (key, value), runs in cells.items() if key == label}, metric)
        for label in _in_order(label for label, _ in cells)
    }
    figure = Figure(figsize=(11.5, 6.4), dpi=100, facecolor="white")
    lost = [label for label, results in lines.items() if results.diverged.any()]
    top = 0.86 - 0.04 * len(lost)
    axes = figure.add_axes((0.08, 0.12, 0.66, top - 0.12))
    _write_title(
        figure,
        title,
        f"{in_words(metric)} after training, by {_name(parameter)}" + _of_seeds("median and quartiles", variants),
    )
    low, high = value_range([part for results in lines.values() for part in results.quartiles], metric)
    for label, results in lines.items():
        _draw_results(axes, results, high, label=_named(group, label), look=_look(label, lines))
    set_value_limits(axes, low, high, metric)
    _set_parameter_axis(axes, sorted({value for _, value in cells}))
    axes.set_xlabel(f"{_name(parameter)} ({parameter})")
    axes.set_ylabel(f"{in_words(metric)} ({metric})")
    axes.grid(alpha=0.25)
    for row, label in enumerate(reversed(lost)):
        color = _look(label, lines)[0]
        _mark_diverged(axes, lines[label], 1.035 + 0.055 * row, f"{_named(group, label)} diverged", color)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=11, handlelength=3.2, frameon=False)
    return figure


@dataclass(frozen=True)
class _Results:
    """The results of one line.

    Args:
        values: The hyperparameter, rising, shape ``(P,)``.
        quartiles: Of the last values of the metric over the seeds, shape ``(3, P)``; not finite where runs diverged.
        diverged: How many runs did, shape ``(P,)``.
        runs: Of so many, shape ``(P,)``.
    """

    values: Array
    quartiles: Array
    diverged: NDArray[np.int64]
    runs: NDArray[np.int64]

    @classmethod
    def of(cls, by_value: Mapping[Any, Sequence[Run]], metric: str) -> "_Results":
        by_value = dict(sorted(by_value.items()))
        columns = [quartiles(_last_values(runs, metric), worst(metric)) for runs in by_value.values()]
        return cls(
            np.array([*by_value], dtype=np.float64),
            np.stack(columns, axis=1),
            np.array([sum(run.has_diverged(metric) for run in runs) for runs in by_value.values()]),
            np.array([len(runs) for runs in by_value.values()]),
        )


def _last_values(runs: Sequence[Run], metric: str) -> Array:
    """The runs' results, those that diverged as the worst; a run that did not log the metric has none, NaN if all."""
    last = [worst(metric) if run.has_diverged(metric) else run.last(metric) for run in runs]
    return np.array([value for value in last if value is not None] or [np.nan])


def _draw_results(axes: Axes, results: _Results, high: float, label: str, look: tuple[str, Any]) -> None:
    color, line = look
    x, (lower, median, upper) = results.values, results.quartiles
    shown = np.where(np.isfinite(median), median, np.nan)
    # A bar ends where its runs diverged or the axes do.
    bars = np.nan_to_num([shown - np.maximum(lower, -1e300), np.minimum(upper, 1e300) - shown])
    bars = bars if (results.runs > 1).any() else None
    axes.errorbar(
        x, shown, yerr=bars, color=color, linestyle=line, marker="o", linewidth=2.2, elinewidth=1.3, capsize=4,
        label=label,
    )  # fmt: skip
    for value, result in zip(x[shown > high], shown[shown > high], strict=True):
        axes.plot([value], [0.975], "^", color=color, markersize=9, transform=axes.get_xaxis_transform())
        axes.annotate(
            f"{result:.1g}", (value, 0.975), xycoords=axes.get_xaxis_transform(), xytext=(0, -8), color=color,
            textcoords="offset points", fontsize=9, ha="center", va="top",
        )  # fmt: skip


def _mark_diverged(axes: Axes, results: _Results, y: float, label: str, color: str) -> None:
    """Crosses in a line of their own above the axes, with the number of runs unless all did."""
    where = axes.get_xaxis_transform()
    for x, diverged, runs in zip(results.values, results.diverged, results.runs, strict=True):
        if diverged == 0:
            continue
        axes.plot([x], [y], "x", color=color, markersize=9, mew=2.6, transform=where, clip_on=False)
        if diverged < runs:
            axes.annotate(
                f"{diverged} of {runs}", (x, y), xycoords=where, xytext=(8, 0), textcoords="offset points",
                fontsize=9, color=color, va="center", annotation_clip=False,
            )  # fmt: skip
    axes.text(1.025, y, f"× {label}", color=color, fontsize=11, va="center", transform=axes.transAxes)


def _set_parameter_axis(axes: Axes, values: Sequence[float]) -> None:
    """A tick for each value that was tried, if they are few."""
    if values[0] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(values) <= _MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(list(values)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_panels(
    variants: Variants,
    metric: str,
    title: str,
    notes: Sequence[str],
    *,
    parameter: str,
    group: str = "norm",
    panels_per_row: int = 4,
    largest_first: bool = False,
    steps_per_epoch: int | None = None,
) -> Figure:
    """Draw the curves of ``metric`` over training in small panels, one for each value of a hyperparameter.

    In each a line for each value of ``group``, the median over the seeds. The axes are the same in all of them; an
    accuracy's reaches from 0 to 1. A cross at the upper edge says where a line's runs diverged.

    Args:
        variants: The runs of each variant.
        metric: The tag of a loss or of an accuracy.
        title: Stands above.
        notes: Not drawn.
        parameter: The hyperparameter that tells the panels apart.
        group: The hyperparameter that tells the lines apart.
        panels_per_row: At most so many side by side.
        largest_first: Whether the values fall from panel to panel.
        steps_per_epoch: With it the horizontal axis counts epochs of so many training steps.

    Raises:
        ValueError: If a run lacks one of the two hyperparameters, variants differ in something else, or a number is
            below 1.
    """
    check_integer("panels_per_row", panels_per_row, at_least=1)
    if steps_per_epoch is not None:
        check_integer("steps_per_epoch", steps_per_epoch, at_least=1)
    cells = _by_values(variants, (parameter, group))
    values, labels = _in_order(value for value, _ in cells), _in_order(label for _, label in cells)
    values = values[::-1] if largest_first else values
    columns = min(panels_per_row, len(values))
    rows = math.ceil(len(values) / columns)
    width, height = max(3.0 * columns + 0.9, 7.5), 2.15 * rows + 1.75
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    page = figure.add_gridspec(
        rows, columns, left=0.75 / width, right=1 - 0.2 / width, top=1 - 1.2 / height, bottom=0.62 / height,
        wspace=0.07, hspace=0.27,
    )  # fmt: skip
    low, high = _common_range(cells, metric)
    first: Axes | None = None
    for index, value in enumerate(values):
        axes = figure.add_subplot(page[index // columns, index % columns], sharex=first, sharey=first)
        first = first or axes
        axes.set_title(f"{_short_name(parameter)} = {_number(value)}", fontsize=10, pad=6)
        lines = {label: cells[value, label] for label in labels if (value, label) in cells}
        _draw_panel(
            axes, lines, metric, high, looks={label: _look(label, labels) for label in labels}, per=steps_per_epoch
        )
        axes.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= len(values), labelsize=8.5)
    assert first is not None
    _set_common_limits(first, low, high, metric)
    first.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _write_title(
        figure, title, f"{in_words(metric)} in training, by {_name(parameter)}" + _of_seeds("median", variants)
    )
    figure.text(0.5, 0.13 / height, "epochs" if steps_per_epoch else "training steps", ha="center", fontsize=11)
    figure.text(0.12 / width, 0.5, f"{in_words(metric)} ({metric})", rotation=90, va="center", fontsize=11)
    _draw_common_legend(figure, {_named(group, label): _look(label, labels) for label in labels}, cells, metric)
    return figure


def _common_range(cells: Mapping[Any, Sequence[Run]], metric: str) -> tuple[float, float]:
    logged = [table for runs in cells.values() if len(table := curves(runs, metric)[1])]
    return value_range([quartiles(table, worst(metric))[1] for table in logged], metric)


def _set_common_limits(axes: Axes, low: float, high: float, metric: str) -> None:
    if is_higher_better(metric) and low >= 0 and high <= 1:
        axes.set_ylim(-0.03, 1.03)
    else:
        set_value_limits(axes, low, high, metric)


def _draw_panel(
    axes: Axes,
    lines: Mapping[Any, Sequence[Run]],
    metric: str,
    high: float,
    looks: Mapping[Any, tuple[str, Any]],
    per: int | None,
) -> None:
    for label, runs in lines.items():
        color, line = looks[label]
        steps, table = curves(runs, metric)
        if not len(steps):
            continue
        median = quartiles(table, worst(metric))[1]
        shown = np.where(np.isfinite(median), median, np.nan)
        axes.plot(steps / (per or 1), shown, color=color, linestyle=line, linewidth=2.0)
        found = [run.first_nonfinite[0] for run in runs if run.first_nonfinite is not None]
        found += steps[~np.isfinite(median)].tolist()
        if sum(run.has_diverged(metric) for run in runs) * 2 > len(runs):
            end = min([*found, int(steps[-1])]) / (per or 1)
            axes.plot(
                [end], [1.0], "x", color=color, markersize=8, mew=2.4, transform=axes.get_xaxis_transform(),
                clip_on=False, zorder=5,
            )  # fmt: skip
        elif (shown > high).all():
            axes.text(
                0.03, 0.95, f"above: {shown[-1]:.1g}", color=color, fontsize=8.5, va="top", transform=axes.transAxes
            )
    axes.grid(alpha=0.25)


def _draw_common_legend(
    figure: Figure, looks: Mapping[str, tuple[str, Any]], cells: Mapping[Any, Sequence[Run]], metric: str
) -> None:
    handles = [
        Line2D([], [], color=color, linestyle=line, linewidth=2.2, label=label)
        for label, (color, line) in looks.items()
    ]
    if any(run.has_diverged(metric) for runs in cells.values() for run in runs):
        label = "diverged: the loss is NaN or infinite at the end"
        handles.append(Line2D([], [], color="black", marker="x", mew=2.4, markersize=8, linestyle="none", label=label))
    height = figure.get_figheight()
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.6 / figure.get_figwidth(), 1 - 0.55 / height),
        ncols=len(handles), fontsize=11, handlelength=3.2, frameon=False, borderaxespad=0.0,
    )  # fmt: skip


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
    cells = _by_values(variants, (rows, *columns))
    maps = {key: _GradientMap.of(runs[0]) for key, runs in cells.items()}
    logs = [gradients.logs for gradients in maps.values()]
    if not any(map(np.size, logs)):
        raise ValueError(
            "no run has param_grad_norm/<path>.weight of a linear layer: train with bnlightning.GradientMonitor."
        )
    scale = _common_scale(logs)
    across, down = _in_order(key[1:] for key in cells), _in_order(key[0] for key in cells)
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
            heading = ", ".join(_named(name, value) for name, value in zip(columns, values, strict=True))
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
            color = _look(label, down)[0]
            figure.text(
                0.22 / width, (y.y0 + y.y1) / 2, _named(rows, label), color=color, weight="bold", fontsize=12,
                rotation=90, ha="center", va="center",
            )  # fmt: skip
    _write_title(figure, title, "gradient of each layer's weights in training" + _of_seeds("first", variants))
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


def _by_values(variants: Variants, names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """The runs by the values of hyperparameters, which must tell the variants apart.

    Raises:
        ValueError: If they do not, or if a run lacks one of them.
    """
    found: dict[tuple[Any, ...], str] = {}
    cells: dict[tuple[Any, ...], list[Run]] = {}
    for name, runs in variants.items():
        values = tuple(runs[0].hparam(parameter) for parameter in names)
        if values in found:
            raise ValueError(
                f"the variants {found[values]!r} and {name!r} have the same {', '.join(names)}: this figure needs runs "
                "that differ in nothing else but the seed. Compare fewer, or name what they differ in."
            )
        found[values] = name
        cells[values] = list(runs)
    return cells


def _in_order(values: Any) -> list[Any]:
    """Each value once: numbers rising, normalisations as everywhere, everything else by name; so, too, in tuples."""
    return sorted(set(values), key=_order)


def _order(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_order, value))
    if isinstance(value, Real):
        return (0, float(value), "")
    known = [*_NORMALIZATIONS]
    return (1, known.index(value) if value in known else len(known), str(value))


def _look(label: Any, labels: Any) -> tuple[str, Any]:
    """Color and line style."""
    return style(str(label), {str(other): [] for other in labels})


def _name(parameter: str) -> str:
    """A hyperparameter as one says it."""
    last = parameter.rpartition(".")[2]
    return _NAMES.get(last, last.replace("_", " "))


def _short_name(parameter: str) -> str:
    return _SHORT_NAMES.get(parameter.rpartition(".")[2], _name(parameter))


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _named(parameter: str, value: Any) -> str:
    """A value that says itself what it is, such as ``tanh``, or with its name before it."""
    if parameter == "norm" and value in _NORMALIZATIONS:
        return _NORMALIZATIONS[value]
    return value if isinstance(value, str) and value != "none" else f"{_short_name(parameter)} = {_number(value)}"


def _of_seeds(what: str, variants: Variants) -> str:
    """What of the seeds is drawn, if there are several."""
    most = max(map(len, variants.values()))
    return f" ({what} of {most} seeds)" if most > 1 else ""


def _write_title(figure: Figure, title: str, what: str) -> None:
    x, y = 0.2 / figure.get_figwidth(), 1 - 0.28 / figure.get_figheight()
    figure.text(x, y, f"{title}: {what}", fontsize=13, weight="bold", va="center")
