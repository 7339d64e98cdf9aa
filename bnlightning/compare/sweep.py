"""The runs of a sweep, compared as the sweep itself declares."""

import functools
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bnlightning.compare.comparison import Comparison, Draw, NotWritten, compare_runs
from bnlightning.compare.names import SWEEP_CONFIG, VAL_LOSS


def compare_sweep(directory: str | Path, metric: str, draw: Draw | None) -> Comparison:
    """Compare the runs of a sweep, with the default figure if the sweep's own cannot show them.

    A sweep that was widened or narrowed on the command line may have runs that its own figure refuses.

    Args:
        directory: The directory of the sweep.
        metric: The tag of the cost or of an accuracy.
        draw: The function that draws the sweep's own figure, ``None`` for the default one.

    Raises:
        NotWritten: If the files cannot be written.
        ValueError: If there is no run in the directory, or none with this metric.
    """
    try:
        return compare_runs(directory, metric, draw)
    except NotWritten:
        raise
    except ValueError as error:
        if draw is None:
            raise
        comparison = compare_runs(directory, metric)
        print(f"The sweep's own figure cannot be drawn, so this is the default one: {error}", file=sys.stderr)
        return comparison


def declared_by_sweep(directory: Path) -> tuple[str, Draw | None]:
    """The metric and the figure that a sweep declares for its runs.

    Both are arguments of the callback ``CompareRuns`` in the sweep's configuration, ``multirun.yaml``. A directory
    without them has ``val/loss`` and the default figure.

    Args:
        directory: The directory of the sweep.

    Returns:
        The metric, and the function that draws. ``None`` stands for the default figure.

    Raises:
        ValueError: If the function that draws cannot be imported.
    """
    file = directory / SWEEP_CONFIG
    config = _read(file) if file.is_file() else {}
    for callback in _entries(_entries(config, "hydra"), "callbacks").values():
        if isinstance(callback, Mapping) and str(callback.get("_target_")).endswith(".CompareRuns"):
            declared = callback.get("draw")
            return callback.get("metric", VAL_LOSS), None if declared is None else _function(declared, file)
    return VAL_LOSS, None


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # Another project's file of the same name.
        return {}


def _entries(config: Any, key: str) -> Mapping[str, Any]:
    entries = config.get(key) if isinstance(config, Mapping) else None
    return entries if isinstance(entries, Mapping) else {}


def _function(declared: Mapping[str, Any], file: Path) -> Draw:
    """The function that ``{_target_: path, _partial_: true, **options}`` stands for."""
    path = declared["_target_"]
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"draw={path!r} in {file} cannot be imported ({error}): run this where its module is found, or call "
            "bnlightning.compare_runs(directory, metric), which draws the default figure."
        ) from error
    return functools.partial(function, **{key: value for key, value in declared.items() if not key.startswith("_")})
