"""Several finished runs, one table and one figure: ``python -m bnlightning.compare <directory>``."""

import argparse
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bnlightning.compare.comparison import Comparison as Comparison
from bnlightning.compare.comparison import Draw as Draw
from bnlightning.compare.comparison import compare_runs as compare_runs

_METRIC = "val/loss"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bnlightning.compare", description="Compare finished runs.")
    parser.add_argument("directory", help="with one run a subdirectory, at any depth")
    parser.add_argument(
        "--metric", help=f"the tag of the cost or of an accuracy (default: the sweep's own, otherwise {_METRIC})"
    )
    options = parser.parse_args(arguments)
    try:
        metric, draw = declared_by_sweep(Path(options.directory))
        comparison = compare_sweep(options.directory, options.metric or metric, draw)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    comparison.print()


def compare_sweep(directory: str | Path, metric: str, draw: Draw | None) -> Comparison:
    """As :func:`compare_runs`, but with the default figure where ``draw`` refuses the runs.

    A sweep that was widened or narrowed on the command line may be none that its own figure can show.
    """
    try:
        return compare_runs(directory, metric, draw)
    except ValueError as error:
        if draw is None:
            raise
        comparison = compare_runs(directory, metric)
        print(f"This is the default figure, since the sweep's own cannot be drawn: {error}", file=sys.stderr)
        return comparison


def declared_by_sweep(directory: Path) -> tuple[str, Draw | None]:
    """How the sweep that made a directory compares its runs: the metric, and what draws the figure.

    Both are arguments of ``bnlightning.experiments.CompareRuns`` in the directory's ``multirun.yaml``, the sweep's
    configuration. Without it, or if it says nothing else: ``val/loss`` and the default figure.

    Raises:
        ValueError: If the function that draws is not found here.
    """
    file = directory / "multirun.yaml"
    config = _read(file) if file.is_file() else {}
    for callback in _entries(_entries(config, "hydra"), "callbacks").values():
        if isinstance(callback, Mapping) and callback.get("_target_") == "bnlightning.experiments.CompareRuns":
            declared = callback.get("draw")
            return callback.get("metric", _METRIC), None if declared is None else _function(declared, file)
    return _METRIC, None


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # Somebody else's.
        return {}


def _entries(config: Any, key: str) -> Mapping[str, Any]:
    entries = config.get(key) if isinstance(config, Mapping) else None
    return entries if isinstance(entries, Mapping) else {}


def _function(declared: Mapping[str, Any], file: Path) -> Draw:
    """What ``{_target_: path, _partial_: true, **options}`` stands for."""
    path = declared["_target_"]
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"draw={path!r} of {file} is not found here ({error}): run this where its module can be imported, or call "
            "bnlightning.compare_runs(directory, metric), which draws the default figure."
        ) from error
    return functools.partial(function, **{key: value for key, value in declared.items() if not key.startswith("_")})


if __name__ == "__main__":
    main()
