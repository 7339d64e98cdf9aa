"""Figures of sweeps over hyperparameters, for the argument ``draw`` of :func:`~bnlightning.compare_runs`.

A hyperparameter is one that a run's ``hparams.yaml`` holds. A nested one has a path with dots, such as
``norm_options.momentum``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from bnlightning._check import check_integer
from bnlightning.compare.figures.style import (
    Array,
    Variants,
    by_values,
    digits_of,
    in_order,
    metric_in_words,
    parameter_in_words,
    seeds_in_words,
    set_value_limits,
    setting_in_words,
    short_parameter,
    style,
    value_range,
    without_math,
    write_title,
)
from bnlightning.compare.runs import Run, curves, is_higher_better, quartiles, worst

_MOST_TICKS = 12
_DIVERGED = "diverged (NaN or infinity)"


def draw_parameter(
    variants: Variants, metric: str, title: str, notes: Sequence[str], *, parameter: str, group: str = "norm"
) -> Figure:
    """Draw how good the runs are at the end against one hyperparameter, a line for each value of another.

    A point is the median of the last value of ``metric`` over the seeds, a bar reaches to the quartiles. A run that
    diverged counts as worse than any other. A point is missing where half of the runs diverged, and crosses above the
    axes say how many did. A triangle at the upper edge is a value beyond it.

    Args:
        variants: The runs of each variant.
        metric: The tag of a loss or of an accuracy.
        title: The title above the figure.
        notes: Not drawn.
        parameter: The hyperparameter along the horizontal axis. Its values are numbers. The axis is logarithmic if all
            are positive.
        group: The hyperparameter that has a line for each of its values.

    Raises:
        ValueError: If a run lacks one of the two hyperparameters, if a value of ``parameter`` is not a number, or if
            variants differ in something else.
    """
    cells = by_values(variants, (group, parameter))
    for _, value in cells:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"parameter={parameter!r} is not possible: {value!r} is no number. Choose another one.")
    lines = {
        label: _Results.of({value: runs for (key, value), runs in cells.items() if key == label}, metric)
        for label in in_order(label for label, _ in cells)
    }
    figure = Figure(figsize=(11.5, 6.4), dpi=100, facecolor="white")
    lost = [label for label, results in lines.items() if results.diverged.any()]
    top = 0.86 - 0.04 * len(lost)
    axes = figure.add_axes((0.08, 0.12, 0.66, top - 0.12))
    write_title(
        figure,
        title,
        f"{metric_in_words(metric)} after training, by {parameter_in_words(parameter)}"
        + seeds_in_words("median and quartiles", variants),
    )
    low, high = value_range([part for results in lines.values() for part in results.quartiles], metric)
    for label, results in lines.items():
        _draw_results(axes, results, high, label=setting_in_words(group, label), look=style(label, lines))
    set_value_limits(axes, low, high, metric)
    _set_parameter_axis(axes, sorted({value for _, value in cells}))
    axes.set_xlabel(f"{parameter_in_words(parameter)} ({parameter})")
    axes.set_ylabel(f"{metric_in_words(metric)} ({metric})")
    axes.grid(alpha=0.25)
    for row, label in enumerate(reversed(lost)):
        color = style(label, lines)[0]
        _mark_diverged(axes, lines[label], 1.035 + 0.055 * row, f"{setting_in_words(group, label)} diverged", color)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=11, handlelength=3.2, frameon=False)
    return without_math(figure)


@dataclass(frozen=True)
class _Results:
    """The results of one line.

    Args:
        values: The values of the hyperparameter, rising, shape ``(P,)``.
        quartiles: The quartiles of the last values of the metric over the seeds, shape ``(3, P)``. They are not finite
            where runs diverged.
        diverged: The number of runs that diverged, shape ``(P,)``.
        runs: The number of runs, shape ``(P,)``.
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
    """The runs' last values. A run that diverged has the worst one. NaN if no run logged the metric."""
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
    """Draw crosses in a line of their own above the axes, with the number of runs unless all diverged."""
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
    """Set a tick for each value that was tried, if they are few."""
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

    A panel has a line for each value of ``group``, the median over the seeds. All panels have the same axes. An
    accuracy's axis reaches from 0 to 1. A cross at the upper edge says where a line's runs diverged.

    Args:
        variants: The runs of each variant.
        metric: The tag of a loss or of an accuracy.
        title: The title above the figure.
        notes: Not drawn.
        parameter: The hyperparameter that has a panel for each of its values.
        group: The hyperparameter that has a line for each of its values.
        panels_per_row: How many panels stand side by side at most.
        largest_first: Whether the values fall from panel to panel.
        steps_per_epoch: The number of training steps in an epoch. With it the horizontal axis counts epochs.

    Raises:
        ValueError: If a run lacks one of the two hyperparameters, if variants differ in something else, or if a number
            is below 1.
    """
    check_integer("panels_per_row", panels_per_row, at_least=1)
    if steps_per_epoch is not None:
        check_integer("steps_per_epoch", steps_per_epoch, at_least=1)
    cells = by_values(variants, (parameter, group))
    values, labels = in_order(value for value, _ in cells), in_order(label for _, label in cells)
    values = values[::-1] if largest_first else values
    columns = min(panels_per_row, len(values))
    rows = math.ceil(len(values) / columns)
    width = max(3.0 * columns + 0.9, 10.5)
    looks = {setting_in_words(group, label): style(label, labels) for label in labels}
    legend_columns, legend_rows = _legend_layout([*looks, _DIVERGED], width)
    top = 1.2 + 0.24 * (legend_rows - 1)
    height = 2.15 * rows + 0.55 + top
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    page = figure.add_gridspec(
        rows, columns, left=0.75 / width, right=1 - 0.2 / width, top=1 - top / height, bottom=0.62 / height,
        wspace=0.07, hspace=0.27,
    )  # fmt: skip
    low, high = _common_range(cells, metric)
    first: Axes | None = None
    for index, value in enumerate(values):
        axes = figure.add_subplot(page[index // columns, index % columns], sharex=first, sharey=first)
        first = first or axes
        axes.set_title(f"{short_parameter(parameter)} = {digits_of(value)}", fontsize=10, pad=6)
        lines = {label: cells[value, label] for label in labels if (value, label) in cells}
        _draw_panel(
            axes, lines, metric, high, looks={label: style(label, labels) for label in labels}, per=steps_per_epoch
        )
        axes.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= len(values), labelsize=8.5)
    assert first is not None
    _set_common_limits(first, low, high, metric)
    first.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    write_title(
        figure,
        title,
        f"{metric_in_words(metric)} in training, by {parameter_in_words(parameter)}"
        + seeds_in_words("median", variants),
    )
    figure.text(0.5, 0.13 / height, "epochs" if steps_per_epoch else "training steps", ha="center", fontsize=11)
    figure.text(0.12 / width, 0.5, f"{metric_in_words(metric)} ({metric})", rotation=90, va="center", fontsize=11)
    _draw_common_legend(figure, looks, legend_columns, cells, metric)
    return without_math(figure)


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


def _legend_layout(labels: Sequence[str], width: float) -> tuple[int, int]:
    """The columns and rows of a legend above panels, in a figure so many inches wide."""
    # A letter of the legend, and the line before it with the space behind.
    entry = 0.085 * max(map(len, labels)) + 0.95
    columns = min(max(int((width - 0.6) / entry), 1), len(labels))
    return columns, math.ceil(len(labels) / columns)


def _draw_common_legend(
    figure: Figure,
    looks: Mapping[str, tuple[str, Any]],
    columns: int,
    cells: Mapping[Any, Sequence[Run]],
    metric: str,
) -> None:
    handles = [
        Line2D([], [], color=color, linestyle=line, linewidth=2.2, label=label)
        for label, (color, line) in looks.items()
    ]
    if any(run.has_diverged(metric) for runs in cells.values() for run in runs):
        handles.append(
            Line2D([], [], color="black", marker="x", mew=2.4, markersize=8, linestyle="none", label=_DIVERGED)
        )
    height = figure.get_figheight()
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.6 / figure.get_figwidth(), 1 - 0.55 / height),
        ncols=columns, fontsize=11, handlelength=3.2, frameon=False, borderaxespad=0.0,
    )  # fmt: skip
