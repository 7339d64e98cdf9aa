"""Several finished runs, one table and one figure: ``python -m bnlightning.compare <directory>``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bnlightning.compare.names import VAL_LOSS
from bnlightning.compare.sweep import compare_sweep, declared_by_sweep


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bnlightning.compare", description="Compare finished runs.")
    parser.add_argument("directory", help="holds the runs, each in a subdirectory at any depth")
    parser.add_argument(
        "--metric", help=f"the tag of the cost or of an accuracy (default: the sweep's own, otherwise {VAL_LOSS})"
    )
    options = parser.parse_args(arguments)
    try:
        metric, draw = declared_by_sweep(Path(options.directory))
        comparison = compare_sweep(options.directory, options.metric or metric, draw)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    comparison.print()


if __name__ == "__main__":
    main()
