"""Several finished runs, one table and one figure.

Everything is read back from the runs' TensorBoard files, so it shows what TensorBoard shows.
"""

import csv
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bnlightning.compare.figures import overview
from bnlightning.compare.names import VAL, health_tag
from bnlightning.compare.runs import (
    COMPARISON_SUFFIX,
    Run,
    curves,
    digits,
    find_runs,
    measured_in_tests,
    published_curves,
    quartiles,
    read_run,
    worst,
)

METRIC = "test metric"

Draw = Callable[[Mapping[str, Sequence[Run]], str, str, Sequence[str]], Figure]
"""Draws the runs of each variant: from these, the metric, a title and the notes to the comparison's figure."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_runs` made of several runs.

    Args:
        directory: The compared directory.
        runs: What was read, a run each, for numbers of your own.
        rows: One mapping from column to text a variant. ``final cost``: median of the last ``val/loss`` over the
            seeds, with the quartiles (of a metric that is no loss the column has the metric's name); ``dead``,
            ``saturated``, ``non-finite``: the last ``health/val_*``, median over the seeds (without an evaluation
            ``health/act_*``, of training batches); ``first non-finite``: the earliest step seen, after so many training
            steps, and the module; ``seconds``: a run's time from its first to its last event, median over the seeds.
        notes: What the tables say, in sentences.
        results: One mapping from column to text a metric that the runs' tests logged as ``test/<metric>``:
            ``test metric``, its name; ``published``, where :class:`~bnlightning.PublishedValues` logged some; each
            variant's value, with several seeds the median and the quartiles. All digits of a float32, up to the eighth
            behind the point.
        curve: One mapping from column to text a step for which :class:`~bnlightning.PublishedCurve` logged a value of
            the metric: ``step``, ``published``, and each variant's value, median over the seeds, to as many places as
            the published ones have, four at least. Variants with publications of their own have a column
            ``published (<variant>)`` each.
        figure: The path of ``comparison.png``.
    """

    directory: Path
    runs: list[Run]
    rows: list[dict[str, str]]
    notes: list[str]
    results: list[dict[str, str]]
    curve: list[dict[str, str]]
    figure: Path

    @property
    def markdown(self) -> str:
        """The tables and the notes in Markdown."""
        parts = [_markdown(table) for table in self._tables()]
        if self.notes:
            parts.append([f"- {note}" for note in self.notes])
        return "\n\n".join("\n".join(lines) for lines in parts) + "\n"

    def print(self) -> None:
        """Print the tables, the path of the figure and the command that opens TensorBoard on the runs."""
        from rich.console import Console

        # Where the output goes to a file, a width of 80 would fold the table.
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140, soft_wrap=True)
        for table in self._tables():
            console.print(_table(table), soft_wrap=False)
        for note in self.notes:
            console.print(note)
        console.print(f"\nFigure: {self.figure}")
        console.print(f"Look closer: tensorboard --logdir {shlex.quote(str(self.directory))}")

    def _tables(self) -> list[list[dict[str, str]]]:
        """What is shown: no column without a value; tests beside what was published of them, or else with the rest."""
        is_published = any("published" in result for result in self.results)
        tests = {} if is_published else {f"test/{result[METRIC]}": result for result in self.results}
        rows = [row | {name: _shortened(result[row["variant"]]) for name, result in tests.items()} for row in self.rows]
        tables = [[{name: row[name] for name in row if any(each[name] != "-" for each in rows)} for row in rows]]
        if is_published:
            tables.append(_marked(self.results))
        if self.curve:
            tables.append(_with_differences(self.curve))
        return tables


def compare_runs(directory: str | Path, metric: str = "val/loss", draw: Draw | None = None) -> Comparison:
    """Compare the finished runs in and below a directory.

    Writes ``comparison.png``, ``comparison.csv`` and ``comparison.md`` into the directory, and the figure into an event
    file there, so that it is in TensorBoard's Images tab, too. An earlier comparison is replaced. Runs that differ in
    nothing but ``seed-<number>`` in their directory's name are one variant.

    A run's last value of the metric is its result. With several seeds medians and quartiles are shown. A run that
    diverged counts as worse than any that did not.

    Whatever a LightningModule's ``test_step`` logs as ``test/<metric>`` is shown by variant, and beside it
    ``published/<metric>``, if that was logged, too; a text logged as ``test/note`` stands among the notes.
    What was published of the metric over the steps, ``published/<metric>``, is drawn beside the curves, and a table
    compares it with the runs' values at those steps; ``comparison_curve.csv`` holds them, too.

    Args:
        directory: With one run a subdirectory, at any depth.
        metric: The tag of the cost or of an accuracy.
        draw: Draws the figure, called with the runs of each variant (a mapping from its name to a sequence of runs,
            as in :attr:`Comparison.runs`), the metric, a title and the notes. One of
            :mod:`bnlightning.compare.figures` with its options, such as
            ``functools.partial(draw_parameter, parameter="learning_rate")``, or your own. The default shows curves,
            fits and how the values of every layer are distributed.

    Raises:
        ValueError: If there is no run in the directory, or none with this metric.
    """
    root = Path(directory).resolve()
    paths = find_runs(root)
    if not paths:
        raise ValueError(f"directory={str(directory)!r} holds no TensorBoard files of a run: give the one that does.")
    runs = [read_run(path, root) for path in paths]
    if not any(metric in run.scalars for run in runs):
        known = sorted(set().union(*(run.scalars for run in runs)))
        raise ValueError(f"metric={metric!r} was logged by no run in {root}: choose one of {', '.join(known)}.")
    variants = _by_variant(runs)
    rows = [_row(name, group, metric) for name, group in variants.items()]
    notes = [note for name, group in variants.items() for note in _notes(name, group)]
    results = _results(measured_in_tests(variants), [*variants])
    curve, agreements = _curve(variants, metric)
    notes += agreements
    comparison = Comparison(root, runs, rows, notes, results, curve, root / "comparison.png")
    figure = (draw or overview.draw)(variants, metric, _title(root), notes)
    figure.savefig(comparison.figure)
    _write_image(root, comparison.figure)
    _write_tables(comparison)
    return comparison


def _write_tables(comparison: Comparison) -> None:
    root, rows, results = comparison.directory, comparison.rows, comparison.results
    (root / "comparison.md").write_text(comparison.markdown, encoding="utf-8")
    published = [{"variant": "published"}] if any("published" in result for result in results) else []
    lines = [
        row | {f"test/{result[METRIC]}": result[row["variant"]] for result in results} for row in [*published, *rows]
    ]
    _write_csv(root / "comparison.csv", lines)
    if comparison.curve:
        _write_csv(root / "comparison_curve.csv", comparison.curve)
    else:
        (root / "comparison_curve.csv").unlink(missing_ok=True)


def _write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # The last row is a variant's: it has all columns.
        writer = csv.DictWriter(file, list(rows[-1]), restval="-")
        writer.writeheader()
        writer.writerows(rows)


def _markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in rows]


def _table(rows: Sequence[dict[str, str]]) -> Any:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(column), overflow="fold") for column in rows[0]))
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _results(
    measured: Mapping[str, Mapping[str, NDArray[np.float64]]], variants: Sequence[str]
) -> list[dict[str, str]]:
    published = any("published" in values for values in measured.values())
    columns = ["published", *variants] if published else variants
    return [
        {METRIC: metric} | {name: _value(values.get(name, np.array([])), metric) for name in columns}
        for metric, values in measured.items()
    ]


def _value(values: NDArray[np.float64], metric: str) -> str:
    if not len(values):
        return "-"
    # Runs that all say the same have all its digits; so has one.
    if len(values) == 1 or (values == values[0]).all():
        return digits(values[0])
    low, median, high = quartiles(values, worst(metric))
    return f"{median:.4g} [{low:.4g}, {high:.4g}]"


def _shortened(text: str) -> str:
    """To four digits: all of them matter only beside published ones."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _marked(results: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Where a variant's digits are not the published ones, a mark says so."""
    return [
        {column: f"≠ {text}" if _differs(result, column) else text for column, text in result.items()}
        for result in results
    ]


def _differs(result: Mapping[str, str], column: str) -> bool:
    published = result.get("published", "-")
    return column != METRIC and "-" not in (published, result[column]) and result[column] != published


def _curve(variants: Mapping[str, Sequence[Run]], metric: str) -> tuple[list[dict[str, str]], list[str]]:
    """What was published of the metric and what the variants have at these steps; how well they agree, in sentences."""
    published = published_curves(variants, metric)
    values = {value for curve in published.values() for value in curve.values()}
    places = max([4, *(len(digits(value).partition(".")[2]) for value in values if "e" not in digits(value))])
    is_one = len({tuple(curve.items()) for curve in published.values()}) == 1
    columns: dict[str, dict[int, str]] = {}
    notes = []
    for name, curve in published.items():
        reference = _publication(name, is_one)
        columns[reference] = {step: f"{value:.{places}f}" for step, value in curve.items()}
        steps, table = curves(variants[name], metric)
        medians = quartiles(table, worst(metric))[1] if len(steps) else []
        ours = dict(zip(steps.tolist(), medians, strict=True))
        columns[name] = {step: f"{ours[step]:.{places}f}" for step in curve if step in ours}
        notes.append(_agreement(name, variants[name], columns[reference], columns[name], metric))
    rows = [
        {"step": str(step)} | {column: texts.get(step, "-") for column, texts in columns.items()}
        for step in sorted(set().union(*published.values()))
    ]
    return rows, notes


def _publication(variant: str, is_one: bool) -> str:
    """The column of what was published for a variant."""
    return "published" if is_one else f"published ({variant})"


def _agreement(
    name: str, runs: Sequence[Run], published: Mapping[int, str], ours: Mapping[int, str], metric: str
) -> str:
    """How many of the published values a variant has, digit for digit, and how far it is from the others."""
    differences = {step: abs(float(ours[step]) - float(published[step])) for step in published if step in ours}
    if not differences:
        return f"{name}: {metric} was published for {len(published)} steps, none of which was evaluated."
    equal = sum(published[step] == ours[step] for step in differences)
    places = len(next(iter(published.values())).partition(".")[2])
    largest = max(differences, key=lambda step: differences[step])
    what = f"{metric}, median of {len(runs)} seeds" if len(runs) > 1 else metric
    text = f"{name}: of {len(differences)} values of {what}, {equal} {'is' if equal == 1 else 'are'} exactly the "
    text += f"published one{'' if equal == 1 else 's'}"
    if equal < len(differences):
        text += f"; the largest difference is {differences[largest]:.{places}f}, at step {largest}"
    return text + "."


def _with_differences(curve: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Behind a variant's value how far it is above or below the published one, if it is not that."""
    return [{column: text + _difference(row, column) for column, text in row.items()} for row in curve]


def _difference(row: Mapping[str, str], column: str) -> str:
    own = _publication(column, is_one=False)
    published = row.get(own, row.get("published", "-"))
    if column in ("step", "published") or "-" in (published, row[column]) or published == row[column]:
        return ""
    places = len(published.partition(".")[2])
    return f" ({float(row[column]) - float(published):+.{places}f})"


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, those without normalisation first, numbers in the names and seeds rising."""
    names = sorted({run.variant for run in runs}, key=lambda name: ("none" not in name.split("_"), _by_numbers(name)))
    return {
        name: sorted((run for run in runs if run.variant == name), key=lambda run: (run.seed or 0, run.path))
        for name in names
    }


def _by_numbers(name: str) -> list[Any]:
    """To sort by: text and numbers by turns, so that 10 comes after 2 and 1e-05 before 0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def _row(name: str, runs: Sequence[Run], metric: str) -> dict[str, str]:
    costs = np.array([cost for run in runs if (cost := run.last(metric)) is not None])
    # What is called a loss is a cost; another metric has its own name.
    result = "final cost" if re.search(r"loss|cost", metric.rpartition("/")[2]) else metric
    return {
        "variant": name,
        "seeds": _seeds(runs),
        result: _result(costs, metric),
        "dead": _share(runs, "dead"),
        "saturated": _share(runs, "saturated"),
        "non-finite": _share(runs, "nonfinite"),
        "first non-finite": _first_nonfinite(runs),
        "seconds": f"{np.median([run.seconds for run in runs]):.1f}",
    }


def _seeds(runs: Sequence[Run]) -> str:
    seeds = [run.seed for run in runs if run.seed is not None]
    if len(seeds) < len(runs):
        return "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _result(costs: NDArray[np.float64], metric: str) -> str:
    if not len(costs):
        return "-"
    low, median, high = quartiles(costs, worst(metric))
    if not np.isfinite(median):
        return "not finite"
    return f"{median:.4g}" if len(costs) == 1 else f"{median:.4g} [{low:.4g}, {high:.4g}]"


def _share(runs: Sequence[Run], name: str) -> str:
    tag = health_tag(name, VAL)
    if not any(tag in run.scalars for run in runs):
        tag = health_tag(name)
    shares = [share for run in runs if (share := run.last(tag)) is not None]
    return f"{100 * np.median(shares):.1f} %" if shares else "-"


def _first_nonfinite(runs: Sequence[Run]) -> str:
    found = [run.first_nonfinite for run in runs if run.first_nonfinite is not None]
    if not found:
        return "none seen" if _share(runs, "nonfinite") != "-" else "-"
    step, layers = _earliest(found)
    where = f"step {step}, {layers}"
    return where if len(runs) == 1 else f"{where} ({len(found)} of {len(runs)} runs)"


def _earliest(found: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """The earliest step, and the modules of all runs in which it was that one."""
    first = min(step for step, _ in found)
    return first, " or ".join(sorted({layer for step, layer in found if step == first}))


def _notes(name: str, runs: Sequence[Run]) -> list[str]:
    """What its runs have to say, and what happened to a variant that did not stay finite: diverging is not dying."""
    notes = [f"{name}: {runs[0].note}"] if runs[0].note else []
    found = [run.first_nonfinite for run in runs if run.first_nonfinite is not None]
    if not found:
        return notes
    step, layer = _earliest(found)
    who = name if len(runs) == 1 else f"{name} ({len(found)} of {len(runs)} runs)"
    steps = "1 training step" if step == 1 else f"{step} training steps"
    text = f"{who} diverged: after {steps} {layer} put out the first NaN or infinity. "
    nonfinite, dead = _share(runs, "nonfinite"), _share(runs, "dead")
    if "-" not in (nonfinite, dead):
        text += f"At the end {nonfinite} of its activations are not finite and {dead} of its units are dead. "
    text += "Diverged is not dead: a dead unit puts out zero for every input, these put out NaN."
    return [*notes, text]


def _title(root: Path) -> str:
    """The experiment's name, above the directory named by the time."""
    return root.parent.name if re.match(r"\d{4}-\d\d-\d\d_", root.name) else root.name


def _write_image(directory: Path, png: Path) -> None:
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    for old in directory.glob(f"events.out.tfevents.*{COMPARISON_SUFFIX}"):
        old.unlink()
    pixels = (matplotlib.image.imread(png)[:, :, :3] * 255).round().astype(np.uint8)
    with SummaryWriter(str(directory), filename_suffix=COMPARISON_SUFFIX) as writer:
        writer.add_image("comparison", pixels, dataformats="HWC")
