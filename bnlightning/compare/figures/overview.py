"""The default figure of a comparison: costs, fits, test metrics, and the distribution of every layer's values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from bnlightning.compare.figures.style import (
    POINTS,
    WARNING,
    Variants,
    histogram_range,
    legend_of,
    metric_in_words,
    quantiles,
    set_value_limits,
    style,
    value_range,
    without_math,
)
from bnlightning.compare.names import PUBLISHED, VAL, Tag, parse_tag
from bnlightning.compare.runs import (
    HistogramAt,
    Run,
    curves,
    digits,
    is_higher_better,
    labels,
    measured_in_tests,
    published_curves,
    quartiles,
    worst,
)

_MAX_COLUMNS = 8
_MAX_STEPS = 6
_BINS = 40
_MAX_RESULTS = 20
_MIN_VALUES = 10
# The width of the table of test metrics, in bold letters of one point.
_HEADINGS = 650.0


def draw(variants: Variants, metric: str, title: str, notes: Sequence[str]) -> Figure:
    """Draw the runs of each variant. A panel that can show only one run shows the first seed's.

    Args:
        variants: The runs of each variant.
        metric: The tag of the cost or of an accuracy.
        title: The title above the figure.
        notes: The sentences below the figure.
    """
    is_curve = max(len(curves(runs, metric)[0]) for runs in variants.values()) > 2
    results = _shown_results(variants, is_curve)
    layers = _layers(variants)
    rows = len(variants) if layers else 0
    texts = [fill(note, 165) for note in notes]
    lines = sum(text.count("\n") + 1 for text in texts)
    tests = [1.2 + 0.27 * len(results)] if results else []
    legend = 0.55 + 0.24 * (len(variants) + 1 + bool(legend_of(variants)[0]))
    fitted = {name: runs[0].predictions[-1] for name, runs in variants.items() if runs[0].predictions}
    # Two evaluations are no curve, where there are other results to show.
    shown = [3.4, legend] if not results or fitted or is_curve else []
    heights = [0.85, *tests, *shown, *([0.7] if rows else []), *[2.42] * rows]
    heights.append(0.3 + 0.24 * lines + 0.1 * len(texts))
    figure = Figure(figsize=(15.0, sum(heights)), dpi=100, facecolor="white")
    figure.text(0.015, 1 - 0.3 / sum(heights), title, fontsize=15, weight="bold", va="center")
    page = figure.add_gridspec(
        len(heights), 1, height_ratios=heights, left=0.075, right=0.985, top=1.0, bottom=0.0, hspace=0.0
    )
    if results:
        _draw_results(figure, page[1], tests[0], variants, results)
    if shown:
        _draw_curves(figure, page[1 + len(tests)], variants, metric, fitted)
    if rows:
        first = 1 + len(tests) + len(shown)
        _draw_heading(figure.add_subplot(page[first]), variants, layers)
        for row, name in enumerate(variants):
            _draw_layers(figure, page[first + 1 + row], name, variants, layers)
    y = 0.24 * lines + 0.1 * len(texts)
    for text in texts:
        figure.text(0.03, y / sum(heights), text, fontsize=10.5, va="top")
        y -= 0.24 * (text.count("\n") + 1) + 0.1
    return without_math(figure)


def _shown_results(variants: Variants, is_curve: bool) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The test metrics that are drawn. Beside a curve only those with published values: the table has the rest."""
    measured = measured_in_tests(variants)
    if is_curve:
        measured = {name: values for name, values in measured.items() if PUBLISHED in values}
    return dict(list(measured.items())[:_MAX_RESULTS])


def _draw_curves(
    figure: Figure,
    place: SubplotSpec,
    variants: Variants,
    metric: str,
    fitted: Mapping[str, tuple[int, NDArray[np.float32]]],
) -> None:
    top = place.subgridspec(1, 2 if fitted else 1, width_ratios=[1.15, 1.0] if fitted else [1.0], wspace=0.16)
    _draw_costs(figure.add_subplot(top[0]), variants, metric)
    if fitted:
        _draw_fits(figure.add_subplot(top[1]), variants, fitted)


def _draw_costs(axes: Axes, variants: Variants, metric: str) -> None:
    logged = {name: curves(runs, metric) for name, runs in variants.items()}
    logged = {name: curve for name, curve in logged.items() if len(curve[0])}
    published = _published_lines(variants, metric)
    title, names = legend_of(variants)
    medians = [quartiles(costs, worst(metric))[1] for _, costs in logged.values()]
    # What a network that has learnt nothing yet gets right would flatten all that comes later.
    first = 1 if is_higher_better(metric) and all(len(median) > 2 for median in medians) else 0
    later = [median[first:] for median in medians]
    low, high = value_range([*later, *(values for _, values in published.values())], metric)
    for name, (steps, costs) in logged.items():
        color, line = style(name, variants)
        lower, median, upper = quartiles(costs, worst(metric))
        outcome = _outcome(variants[name], steps, median, high, metric)
        # A curve of one point would be no line.
        marker = "o" if np.isfinite(median).sum() == 1 else None
        shown = np.where(np.isfinite(median), median, np.nan)
        label = names[name] + outcome
        axes.plot(steps, shown, color=color, linestyle=line, linewidth=2.2, marker=marker, label=label)
        if len(costs) > 1:
            bottom = np.where(np.isfinite(lower), lower, low)
            partly = np.isfinite(lower) | np.isfinite(upper)
            top = np.where(np.isfinite(upper), upper, 10 * abs(high) + 1)
            axes.fill_between(steps, bottom, top, where=partly, color=color, alpha=0.18, lw=0)
        if _is_lost(variants[name], median, metric):
            end = _first_nonfinite(variants[name], steps, median)
            axes.plot([end], [0.96], "x", color=color, markersize=12, mew=3, transform=axes.get_xaxis_transform())
    for label, curve in published.items():
        axes.plot(*curve, color="black", linestyle="dashed", linewidth=1.4, marker=".", label=label)
    set_value_limits(axes, low, high, metric)
    seeds = max(len(runs) for runs in variants.values())
    axes.set_title(
        (metric_in_words(metric).capitalize() if is_higher_better(metric) else "Cost")
        + (f", median and quartiles of {seeds} seeds" if seeds > 1 else ""),
        fontsize=11,
        loc="left",
    )
    axes.set_xlabel("training steps")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25)
    _draw_legend(axes, title)


def _draw_legend(axes: Axes, title: str) -> None:
    """Draw the legend below the axes, where it hides nothing."""
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.16), fontsize=11, handlelength=3.5, frameon=False,
        borderaxespad=0.0, title=title or None, title_fontsize=11, alignment="left",
    )  # fmt: skip


def _published_lines(variants: Variants, metric: str) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The steps and values that were published for a metric, by label. One label if all variants share them."""
    published = published_curves(variants, metric)
    words = labels(variants)
    is_one = len({tuple(curve.items()) for curve in published.values()}) == 1
    return {
        PUBLISHED if is_one else f"{PUBLISHED} ({words[name]})": (np.array([*curve]), np.array([*curve.values()]))
        for name, curve in published.items()
    }


def _is_lost(runs: Sequence[Run], median: NDArray[np.float64], metric: str) -> bool:
    """Whether a variant's median run diverged. An accuracy is finite even then, so that the monitors decide."""
    all_diverged = is_higher_better(metric) and all(run.first_nonfinite is not None for run in runs)
    return all_diverged or not bool(np.isfinite(median).all())


def _outcome(
    runs: Sequence[Run], steps: NDArray[np.int64], median: NDArray[np.float64], high: float, metric: str
) -> str:
    """The end of a curve's label, if the curve leaves the picture: it diverged, or some values are too high."""
    highest = int(np.argmax(np.where(np.isfinite(median), median, -np.inf)))
    is_outside = np.isfinite(median[highest]) and median[highest] > high
    outside = f"{median[highest]:.2g} at step {steps[highest]}" if is_outside else ""
    if not _is_lost(runs, median, metric):
        few = sum(run.first_nonfinite is not None for run in runs)
        told = [f"above: {outside}"] if outside else []
        told += [f"{few} of {len(runs)} seeds diverged"] if few else []
        return f" ({', '.join(told)})" if told else ""
    first = _first_nonfinite(runs, steps, median)
    return f" diverged (×): NaN or infinite from step {first} on" + (f", {outside}" if outside else "")


def _first_nonfinite(runs: Sequence[Run], steps: NDArray[np.int64], median: NDArray[np.float64]) -> int:
    """The step at which a variant diverged. A monitor may see it before the next evaluation does."""
    found = [run.first_nonfinite[0] for run in runs if run.first_nonfinite is not None]
    return int(min([*found, *steps[~np.isfinite(median)].tolist()]))


def _draw_fits(axes: Axes, variants: Variants, shown: Mapping[str, tuple[int, NDArray[np.float32]]]) -> None:
    _, points = next(iter(shown.values()))
    size = float(np.clip(125 / np.sqrt(len(points)), 2.5, 9.0))
    axes.plot(points[:, 0], points[:, 1], ".", color=POINTS, markersize=size, label="data", zorder=0)
    low, high = np.quantile(points[:, 1], [0.001, 0.999])
    bottom, top = _with_near_fits(low - 0.08 * (high - low), high + 0.08 * (high - low), shown)
    axes.set_ylim(bottom, top)
    title, names = legend_of(variants)
    for name, (_, points) in shown.items():
        color, line = style(name, variants)
        order = np.argsort(points[:, 0], kind="stable")
        x, prediction = points[order, 0], points[order, 2]
        if np.isfinite(prediction).all():
            outside = " (off the axis)" if (prediction < bottom).all() or (prediction > top).all() else ""
            axes.plot(x, prediction, color=color, linestyle=line, linewidth=2.4, label=names[name] + outside)
        else:
            axes.plot([], [], "x", color=color, mew=3, markersize=9, label=f"{names[name]}: prediction is NaN")
    step = max(step for step, _ in shown.values())
    axes.set_title(
        f"Data and fit after {step} step{'s' if step != 1 else ''}{_which_seed(variants)}", fontsize=11, loc="left"
    )
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    _draw_legend(axes, title)


def _with_near_fits(
    bottom: float, top: float, shown: Mapping[str, tuple[int, NDArray[np.float32]]]
) -> tuple[float, float]:
    """The data's limits. They are widened if all fits lie wholly beyond them, but not far."""
    fits = [points[:, 2] for _, points in shown.values() if np.isfinite(points[:, 2]).all()]
    if not fits or not all((fit < bottom).all() or (fit > top).all() for fit in fits):
        return bottom, top
    values = np.concatenate([*fits, [bottom, top]])
    low, high = float(values.min()), float(values.max())
    if high - low > 10 * (top - bottom):
        return bottom, top
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def _which_seed(variants: Variants) -> str:
    """The seed that a panel shows if there are several and it can show only one."""
    seed = next(iter(variants.values()))[0].seed
    return f", seed {seed}" if seed is not None and max(map(len, variants.values())) > 1 else ""


def _draw_results(
    figure: Figure,
    place: SubplotSpec,
    height: float,
    variants: Variants,
    results: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> None:
    """Draw a line for each test metric: its values on one common axis, and their digits beside it."""
    published = any(PUBLISHED in values for values in results.values())
    # Room for the metrics' names on the left, for the variants' above and for the ticks below.
    cells = place.subgridspec(
        3, 3, wspace=0.0, hspace=0.0, width_ratios=[0.07, 1.0, 1.0], height_ratios=[0.5, height - 1.2, 0.7]
    )
    axes, table = figure.add_subplot(cells[1, 1]), figure.add_subplot(cells[1, 2])
    for row, (metric, values) in enumerate(results.items()):
        if published and PUBLISHED in values:
            axes.plot(values[PUBLISHED], [row], "|", color="black", markersize=17, mew=2.2, zorder=1)
        for index, name in enumerate(variants):
            median = quartiles(values[name], worst(metric))[1] if name in values else np.nan
            # One above the other, so that equal ones do not hide each other.
            y = row + 0.5 * (index + 1) / (len(variants) + 1) - 0.25
            axes.plot([median], [y], "o", color=style(name, variants)[0], markersize=6, zorder=2)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_yticks(range(len(results)), list(results), fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25)
    meaning = " (● a variant, | published, red: other digits)" if published else ""
    axes.set_title(f"Test metrics after the last step{meaning}", fontsize=11, loc="left")
    _set_value_scale(axes, [value for values in results.values() for logged in values.values() for value in logged])
    _write_digits(table, variants, results, [PUBLISHED, *variants] if published else list(variants))


def _write_digits(
    axes: Axes,
    variants: Variants,
    results: Mapping[str, Mapping[str, NDArray[np.float64]]],
    columns: Sequence[str],
) -> None:
    """Write the medians of the metrics. Those that are not the published ones are bold."""
    axes.set_axis_off()
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(results) - 0.5, -0.5)
    size = 10.5 if len(columns) <= 4 else 42 / len(columns)
    words = labels(variants)
    for column, name in enumerate(columns):
        color = style(name, variants)[0] if name in variants else "black"
        label = fill(words.get(name, name), int(_HEADINGS / (len(columns) * size)), break_long_words=False)
        axes.text(column + 0.5, -0.6, label, color=color, weight="bold", fontsize=size, ha="center", va="bottom")
        for row, (metric, values) in enumerate(results.items()):
            text = digits(quartiles(values[name], worst(metric))[1]) if name in values else "-"
            differs = "-" not in (text, published := _published(values)) and text != published
            color, weight = (WARNING, "bold") if differs else ("black", "normal")
            axes.text(column + 0.5, row, text, fontsize=size, color=color, weight=weight, ha="center", va="center")


def _published(values: Mapping[str, NDArray[np.float64]]) -> str:
    return digits(values[PUBLISHED][0]) if PUBLISHED in values else "-"


def _set_value_scale(axes: Axes, values: Sequence[float]) -> None:
    """Set an axis that is logarithmic beyond the smallest magnitudes if a linear one would show the largest only."""
    magnitudes = np.abs([value for value in values if np.isfinite(value) and value != 0])
    if len(magnitudes) and magnitudes.max() > 100 * np.median(magnitudes):
        axes.set_xscale("symlog", linthresh=float(np.median(magnitudes)))


def _draw_heading(axes: Axes, variants: Variants, layers: Sequence[Tag]) -> None:
    axes.set_axis_off()
    where = "on the evaluated points" if layers[0].phase == VAL else "in the sampled training batches"
    text = (
        f"The distribution of each layer's values {where}{_which_seed(variants)}. The first step is at the top. Each "
        "ridge has its own scale. Lone spikes are cut.\nUnder a layer's name stands what is notable at the last step."
    )
    axes.text(0.0, 0.1, text, fontsize=11, transform=axes.transAxes, va="bottom", linespacing=1.4)


def _layers(variants: Variants) -> list[Tag]:
    """The histogram tags that are drawn: from evaluations if there are any, for layers that all variants have."""
    by_variant = [
        [tag for name in runs[0].histograms if (tag := parse_tag(name)) is not None and tag.kind == "layer"]
        for runs in variants.values()
    ]
    tags = list(dict.fromkeys(tag for logged in by_variant for tag in logged if tag.statistic == "hist"))
    tags = [tag for tag in tags if tag.phase == VAL] or tags
    # A few values have no distribution.
    most = {
        tag: max(h.counts.sum() for runs in variants.values() for h in runs[0].histograms.get(str(tag), []))
        for tag in tags
    }
    tags = [tag for tag in tags if most[tag] >= _MIN_VALUES]
    # A layer that only one variant has, such as a normalisation, cannot be compared.
    tags = [tag for tag in tags if all(tag in logged for logged in by_variant)] or tags
    chosen = np.linspace(0, len(tags) - 1, min(len(tags), _MAX_COLUMNS)).round().astype(int)
    return [tags[index] for index in chosen]


def _draw_layers(figure: Figure, place: SubplotSpec, name: str, variants: Variants, layers: Sequence[Tag]) -> None:
    """Draw a variant's row of layers."""
    # Room above for what is written over each cell, and below for the ticks.
    cells = place.subgridspec(3, len(layers), wspace=0.12, hspace=0.0, height_ratios=[0.72, 1.5, 0.2])
    run = variants[name][0]
    for column, layer in enumerate(layers):
        axes = figure.add_subplot(cells[1, column])
        _draw_layer(axes, run, layer, labelled=column == 0)
        axes.set_title(f"{layer.path}\n{_health(run, layer)}", fontsize=9, pad=2)
        if column == 0:
            color = style(name, variants)[0]
            # From the left edge of the page, however wide the columns are.
            left = blended_transform_factory(figure.transFigure, axes.transAxes)
            axes.text(0.012, 1.36, labels(variants)[name], fontsize=12, weight="bold", color=color, transform=left)


def _draw_layer(axes: Axes, run: Run, tag: Tag, labelled: bool) -> None:
    """Draw one ridge for each step, the first step at the top."""
    by_step = {histogram.step: histogram for histogram in run.histograms.get(str(tag), [])}
    steps = _steps(run, tag)
    low, high = histogram_range(list(by_step.values()))
    for position, step in enumerate(steps):
        base = len(steps) - 1 - position
        shade = str(0.72 - 0.52 * position / max(len(steps) - 1, 1))
        axes.plot([low, high], [base, base], color="#999999", linewidth=0.5, zorder=position)
        histogram = by_step.get(step)
        words = _in_words(histogram, low, high)
        if histogram is None or words:
            _write_words(axes, (low + high) / 2, base, words)
            continue
        edges, density = _rebin(histogram, low, high)
        ridge = base + 1.25 * _scaled(density)
        axes.stairs(
            ridge, edges, baseline=base, fill=True, facecolor=shade, edgecolor="black", linewidth=0.5, zorder=position
        )
    axes.set_xlim(low, high)
    axes.set_ylim(-0.15, len(steps) + 0.45)
    axes.set_xticks([low, high], [f"{low:.3g}", f"{high:.3g}"], fontsize=7.5)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.set_yticks(range(len(steps)), [f"step {step}" for step in reversed(steps)] if labelled else [], fontsize=7.5)
    axes.tick_params(length=0, pad=2)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _in_words(histogram: HistogramAt | None, low: float, high: float) -> str:
    """Words for what a ridge would not show: no finite value, one value only, values far beyond the range."""
    if histogram is None:
        return "NaN"
    middle, width = (histogram.edges[0] + histogram.edges[-1]) / 2, histogram.edges[-1] - histogram.edges[0]
    if len(histogram.counts) == 1 and width <= max(3e-3 * abs(middle), 3e-6):
        return f"all {middle:.3g}"
    if quantiles(histogram, 0.9)[0] - high > 10 * (high - low):
        return f"up to {histogram.edges[-1]:.0e}"
    return ""


def _write_words(axes: Axes, x: float, base: float, words: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    axes.text(x, base + 0.2, words, ha="center", fontsize=8, color=WARNING, weight="bold", bbox=box, zorder=99)


def _scaled(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """The density scaled to at most 1. A lone spike, such as a ReLU's zeros, is cut, lest it flatten the rest."""
    second, first = np.sort(density)[-2:]
    scale = max(second, first / 8, 1e-300) * (1.0 if first < 3 * second else 1.6)
    scaled: NDArray[np.float64] = np.minimum(density / scale, 1.0)
    return scaled


def _steps(run: Run, tag: Tag) -> list[int]:
    """A few of the steps at which the layer was sampled, those without a finite value included."""
    logged = run.scalars.get(str(replace(tag, statistic="nonfinite")))
    steps = (
        logged[0]
        if logged is not None
        else np.array([histogram.step for histogram in run.histograms.get(str(tag), [])])
    )
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_STEPS)).round().astype(int)
    return [int(steps[index]) for index in chosen]


def _health(run: Run, tag: Tag) -> str:
    """The worst thing to know about a layer at its last step."""
    shares = {
        what: run.last(str(replace(tag, statistic=key)))
        for key, what in (("nonfinite", "NaN/inf"), ("dead", "dead"), ("saturated", "saturated"), ("zero", "zero"))
    }
    for what, share in shares.items():
        if share is not None and (share >= 0.005 or what == "saturated"):
            return f"{100 * share:.0f} % {what}"
    return ""


def _rebin(histogram: HistogramAt, low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The counts in equally wide bins. Each original bin is spread evenly over its width."""
    edges = np.linspace(low, high, _BINS + 1)
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    return edges, np.diff(np.interp(edges, histogram.edges, cumulative))
