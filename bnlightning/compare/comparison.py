"""Several finished runs, one table and one figure.

All numbers come from the runs' TensorBoard files, so that they are the ones TensorBoard shows.
"""

import csv
import io
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bnlightning._check import check_path
from bnlightning.compare.figures import overview
from bnlightning.compare.names import (
    COMPARISON,
    COMPARISON_CURVE,
    COMPARISON_FIGURE,
    COMPARISON_PAGE,
    COMPARISON_SUFFIX,
    COMPARISON_TABLE,
    EVENT_FILES,
    PUBLISHED,
    TEST,
    VAL,
    VAL_LOSS,
    health_tag,
    sort_key,
    title_of,
)
from bnlightning.compare.runs import (
    Run,
    curves,
    digits,
    find_runs,
    labels,
    measured_in_tests,
    published_curves,
    quartiles,
    read_run,
    worst,
)
from bnlightning.writing.canvas import own_settings

Draw = Callable[[Mapping[str, Sequence[Run]], str, str, Sequence[str]], Figure]
"""A function from the runs of each variant, the metric, a title and the notes to the comparison's figure."""

_METRIC = "test metric"
_PART = ".part"
# For a standard output without the characters of the tables.
_IN_ASCII = str.maketrans({"≠": "!=", "×": "x"})
_DESCRIPTION = (
    "The figure of the comparison of all runs below this directory. The same file as `comparison.png`; "
    "`comparison.md` has its tables."
)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_runs` made of several runs.

    Args:
        directory: The compared directory.
        runs: The runs as they were read, for numbers of your own.
        rows: One mapping from column to text for each variant, which is called as people call it: "no norm".
            The columns are:

            - ``final cost``: the last ``val/loss``, median over the seeds with the quartiles. A metric that is no loss
              gives the column its own name.
            - ``dead``, ``saturated``, ``non-finite``: the last ``health/val_*``, median over the seeds. Runs without
              an evaluation have ``health/*``, which is over training batches.
            - ``first non-finite``: the earliest step at which a layer put out NaN or infinity, and the layer.
            - ``seconds``: the time from a run's first event to its last, median over the seeds.
        notes: The sentences below the tables.
        results: One mapping from column to text for each metric that a test logged as ``test/<metric>``.
            ``test metric`` is its name. ``published`` is what :class:`~bnlightning.PublishedValues` logged. Each
            variant's column has its value, or median and quartiles over several seeds. A value has all digits of a
            float32, at most eight behind the point.
        curve: One mapping from column to text for each step at which :class:`~bnlightning.PublishedCurve` logged a
            value of the metric. The columns are ``step``, ``published`` and the variants, with medians over the seeds.
            They have as many decimal places as the published values, at least four. If variants have publications of
            their own, the columns are called ``published (<variant>)``.
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
        """Print the tables, the notes, the path of the figure and the command that opens TensorBoard on the runs."""
        self.print_tables()
        print(_printable(f"\nFigure: {self.figure}"))
        print(_printable(f"Look closer: tensorboard --logdir {shlex.quote(str(self.directory))}"), flush=True)

    def print_tables(self) -> None:
        """Print the tables and the notes."""
        from rich.console import Console

        # Where the output goes to a file, a width of 80 would fold the table.
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140, soft_wrap=True)
        for table in self._tables():
            console.print(_table(table), soft_wrap=False)
        for note in self.notes:
            console.print(_printable(note))

    def _tables(self) -> list[list[dict[str, str]]]:
        """The tables that people see.

        A column without a value is left out. Test metrics have a table of their own only beside published values.
        """
        is_published = any(PUBLISHED in result for result in self.results)
        tests = {} if is_published else {f"{TEST}/{result[_METRIC]}": result for result in self.results}
        rows = [row | {name: _shortened(result[row["variant"]]) for name, result in tests.items()} for row in self.rows]
        tables = [[{name: row[name] for name in row if any(each[name] != "-" for each in rows)} for row in rows]]
        if is_published:
            tables.append(_marked(self.results))
        if self.curve:
            tables.append(_with_differences(self.curve))
        return tables


class NotWritten(ValueError):
    """Raised if the runs are compared, but the files cannot be written.

    Args:
        comparison: The comparison, whose tables can be printed.
        error: What the operating system says.
    """

    def __init__(self, comparison: Comparison, error: OSError) -> None:
        path = str(error.filename or comparison.directory).removesuffix(_PART)
        super().__init__(
            f"The comparison is not written: {path!r} cannot be written ({error.strerror or error}). "
            "Make room there, or copy the runs to where you may write."
        )
        self.comparison = comparison


def compare_runs(directory: str | Path, metric: str = VAL_LOSS, draw: Draw | None = None) -> Comparison:
    """Compare the finished runs in and below a directory.

    The function writes ``comparison.png``, ``comparison.csv`` and ``comparison.md`` into the directory. The figure is
    in TensorBoard's Images tab too, as a run called ``comparison``. An earlier comparison is replaced.

    Runs are one variant if their directories' names differ in nothing but ``seed-<number>``. A run's result is its last
    value of the metric. Several seeds are shown by median and quartiles. A run that diverged counts as worse than any
    other.

    Some tags have a meaning here:

    | tag | where it is shown |
    |---|---|
    | ``test/<metric>`` | in a table, by variant |
    | ``published/<metric>`` | beside ``test/<metric>``, or beside the curve of a metric that is logged over the steps |
    | ``test/note``, a text | among the notes |

    Values that were published over the steps are compared with the runs' step by step. ``comparison_curve.csv`` holds
    both.

    Args:
        directory: The directory that holds the runs, each in a subdirectory at any depth.
        metric: The tag of the cost or of an accuracy.
        draw: The function that draws the figure, called with the runs of each variant, the metric, a title and the
            notes. The runs are a mapping from :attr:`Run.variant` to a sequence of runs. Give one of
            :mod:`bnlightning.compare.figures` with its options, such as
            ``functools.partial(draw_parameter, parameter="learning_rate")``, or your own. The default shows curves,
            fits and the distribution of every layer's values.

    Raises:
        ValueError: If there is no run in the directory, or none with this metric, or if the files cannot be written.
    """
    root = _readable(directory)
    paths = find_runs(root)
    if not paths:
        raise ValueError(f"directory={str(directory)!r} holds no TensorBoard files of a run: give the one that does.")
    runs = [read_run(path, root) for path in paths]
    if not any(metric in run.scalars for run in runs):
        known = sorted(set().union(*(run.scalars for run in runs)))
        raise ValueError(f"metric={metric!r} was logged by no run in {root}: choose one of {', '.join(known)}.")
    variants = _by_variant(runs)
    words = labels(variants)
    rows = [_row(words[name], group, metric) for name, group in variants.items()]
    notes = [note for name, group in variants.items() for note in _notes(words[name], group)]
    results = _results(measured_in_tests(variants), words)
    curve, agreements = _curve(variants, metric, words)
    notes += agreements
    comparison = Comparison(root, runs, rows, notes, results, curve, root / COMPARISON_FIGURE)
    with own_settings():
        figure = (draw or overview.draw)(variants, metric, title_of(root.name, root.parent.name), notes)
        try:
            _write(comparison, figure)
        except OSError as error:
            raise NotWritten(comparison, error) from error
    return comparison


def _readable(directory: str | Path) -> Path:
    """The directory's full path, if its files can be listed and their names are text."""
    check_path("directory", directory)
    root = Path(directory).resolve()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"directory={str(directory)!r} {what}: give the directory that holds the runs.")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(
            f"directory={str(directory)!r} cannot be read (Permission denied): give one that you may read."
        )
    return root


def _write(comparison: Comparison, figure: Figure) -> None:
    """Write all files, each as a whole or not at all."""
    root = comparison.directory
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files = {comparison.figure: png.getvalue(), root / COMPARISON_PAGE: comparison.markdown.encode()}
    files[root / COMPARISON_TABLE] = _csv(_table_lines(comparison))
    if comparison.curve:
        files[root / COMPARISON_CURVE] = _csv(comparison.curve)
    for path, content in files.items():
        _replace(path, content)
    if not comparison.curve:
        (root / COMPARISON_CURVE).unlink(missing_ok=True)
    _write_image(root, png.getvalue())


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}{_PART}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _table_lines(comparison: Comparison) -> list[dict[str, str]]:
    results = comparison.results
    # A row's runs, by the names of their directories.
    runs = _by_variant(comparison.runs).values()
    rows = [
        row | {"directory": ", ".join(run.path.relative_to(comparison.directory).as_posix() for run in group)}
        for row, group in zip(comparison.rows, runs, strict=True)
    ]
    published = [{"variant": PUBLISHED}] if any(PUBLISHED in result for result in results) else []
    return [
        row | {f"{TEST}/{result[_METRIC]}": result[row["variant"]] for result in results} for row in [*published, *rows]
    ]


def _csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    # The last row is a variant's: it has all columns.
    writer = csv.DictWriter(text, list(rows[-1]), restval="-")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in rows]


def _table(rows: Sequence[dict[str, str]]) -> Any:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(_printable(column)), overflow="fold") for column in rows[0]))
    for row in rows:
        table.add_row(*(Text(_printable(text)) for text in row.values()))
    return table


def _printable(text: str) -> str:
    """The text in characters that the standard output has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_IN_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def _results(
    measured: Mapping[str, Mapping[str, NDArray[np.float64]]], words: Mapping[str, str]
) -> list[dict[str, str]]:
    is_published = any(PUBLISHED in values for values in measured.values())
    columns = {PUBLISHED: PUBLISHED, **words} if is_published else words
    return [
        {_METRIC: metric} | {column: _value(values.get(name, np.array([])), metric) for name, column in columns.items()}
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
    """Four digits of a number: all of them matter only beside a published one."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _marked(results: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The results with a mark at digits that are not the published ones."""
    return [
        {column: f"≠ {text}" if _differs(result, column) else text for column, text in result.items()}
        for result in results
    ]


def _differs(result: Mapping[str, str], column: str) -> bool:
    published = result.get(PUBLISHED, "-")
    return column != _METRIC and "-" not in (published, result[column]) and result[column] != published


def _curve(
    variants: Mapping[str, Sequence[Run]], metric: str, words: Mapping[str, str]
) -> tuple[list[dict[str, str]], list[str]]:
    """The published values beside the variants' at the same steps, and sentences on how well they agree."""
    published = published_curves(variants, metric)
    values = {value for curve in published.values() for value in curve.values()}
    places = max([4, *(len(digits(value).partition(".")[2]) for value in values if "e" not in digits(value))])
    is_one = len({tuple(curve.items()) for curve in published.values()}) == 1
    columns: dict[str, dict[int, str]] = {}
    notes = []
    for name, curve in published.items():
        reference = _publication(words[name], is_one)
        columns[reference] = {step: f"{value:.{places}f}" for step, value in curve.items()}
        steps, table = curves(variants[name], metric)
        medians = quartiles(table, worst(metric))[1] if len(steps) else []
        ours = dict(zip(steps.tolist(), medians, strict=True))
        columns[words[name]] = {step: f"{ours[step]:.{places}f}" for step in curve if step in ours}
        notes.append(_agreement(words[name], variants[name], columns[reference], columns[words[name]], metric))
    rows = [
        {"step": str(step)} | {column: texts.get(step, "-") for column, texts in columns.items()}
        for step in sorted(set().union(*published.values()))
    ]
    return rows, notes


def _publication(variant: str, is_one: bool) -> str:
    """The name of the column with the values that were published for a variant."""
    return PUBLISHED if is_one else f"{PUBLISHED} ({variant})"


def _agreement(
    name: str, runs: Sequence[Run], published: Mapping[int, str], ours: Mapping[int, str], metric: str
) -> str:
    """How many of a variant's values are exactly the published ones, and how far the others are from them."""
    differences = {step: abs(float(ours[step]) - float(published[step])) for step in published if step in ours}
    if not differences:
        return f"{name}: {metric} was published for {len(published)} steps, none of which was evaluated."
    equal = sum(published[step] == ours[step] for step in differences)
    places = len(next(iter(published.values())).partition(".")[2])
    largest = max(differences, key=lambda step: differences[step])
    what = f"{metric}, median of {len(runs)} seeds" if len(runs) > 1 else metric
    are = "is exactly the published one" if equal == 1 else "are exactly the published ones"
    text = f"{name}: {equal} of {len(differences)} values of {what} {are}."
    if equal < len(differences):
        text += f" The largest difference is {differences[largest]:.{places}f}, at step {largest}."
    return text


def _with_differences(curve: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The curve with each variant's difference from the published value, if there is one, behind its value."""
    return [{column: text + _difference(row, column) for column, text in row.items()} for row in curve]


def _difference(row: Mapping[str, str], column: str) -> str:
    own = _publication(column, is_one=False)
    published = row.get(own, row.get(PUBLISHED, "-"))
    if column in ("step", PUBLISHED) or "-" in (published, row[column]) or published == row[column]:
        return ""
    places = len(published.partition(".")[2])
    return f" ({float(row[column]) - float(published):+.{places}f})"


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant. Variants without normalisation come first, numbers in the names and seeds rise."""
    names = sorted({run.variant for run in runs}, key=sort_key)
    return {
        name: sorted((run for run in runs if run.variant == name), key=lambda run: (run.seed or 0, run.path))
        for name in names
    }


def _row(name: str, runs: Sequence[Run], metric: str) -> dict[str, str]:
    costs = np.array([cost for run in runs if (cost := run.last(metric)) is not None])
    # Only what is called a loss is a cost.
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
    """The earliest step of all runs, and the layers it was found in."""
    first = min(step for step, _ in found)
    return first, " or ".join(sorted({layer for step, layer in found if step == first}))


def _notes(name: str, runs: Sequence[Run]) -> list[str]:
    """A variant's own note, whether it was cut off, and what happened to it if it diverged."""
    notes = [f"{name}: {runs[0].note}"] if runs[0].note else []
    notes += _cut_off(name, runs)
    found = [run.first_nonfinite for run in runs if run.first_nonfinite is not None]
    if not found:
        return notes
    step, layer = _earliest(found)
    who = name if len(runs) == 1 else f"{name} ({len(found)} of {len(runs)} runs)"
    steps = "1 training step" if step == 1 else f"{step} training steps"
    text = f"{who} diverged: after {steps} the first NaN or infinity was in {layer}. "
    nonfinite, dead = _share(runs, "nonfinite"), _share(runs, "dead")
    if "-" not in (nonfinite, dead):
        text += (
            f"At the end {nonfinite} of the whole network's values are not finite and {dead} of its units are dead. "
        )
    text += "Diverged is not dead: a dead unit puts out zero for every input, a diverged one puts out NaN."
    return [*notes, text]


def _cut_off(name: str, runs: Sequence[Run]) -> list[str]:
    """Which runs have not finished: what they reached is not their result."""
    steps = [run.last_step for run in runs if run.is_cut_off]
    if not steps:
        return []
    who = name if len(runs) == 1 else f"{name} ({len(steps)} of {len(runs)} runs)"
    where = f"it stops at step {steps[0]}" if len(steps) == 1 else f"the first of them stops at step {min(steps)}"
    return [f"{who} is not finished: {where}."]


def _write_image(directory: Path, png: bytes) -> None:
    """Write the figure as a TensorBoard run of its own, with a description."""
    import matplotlib.image
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.summary.writer.record_writer import RecordWriter

    run = directory / COMPARISON
    run.mkdir(exist_ok=True)
    # Comparisons of earlier versions wrote into the directory itself.
    earlier = [old for folder in (directory, run) for old in folder.glob(f"{EVENT_FILES}{COMPARISON_SUFFIX}")]
    height, width, channels = matplotlib.image.imread(io.BytesIO(png)).shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    metadata = create_summary_metadata(COMPARISON, _DESCRIPTION, converted_to_tensor=True)
    # Without it TensorBoard's fast loader drops the description.
    metadata.data_class = DATA_CLASS_BLOB_SEQUENCE
    summary = Summary(value=[Summary.Value(tag=COMPARISON, image=image, metadata=metadata)])
    # Not by TensorBoard's writer, whose thread would be the one to meet a full disk.
    now, content = time.time(), io.BytesIO()
    records = RecordWriter(content)
    for event in (Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, summary=summary)):
        records.write(event.SerializeToString())
    name = EVENT_FILES.replace("*", f"{now:.6f}.{socket.gethostname()}.{os.getpid()}.0{COMPARISON_SUFFIX}")
    _replace(run / name, content.getvalue())
    for old in earlier:
        old.unlink()
