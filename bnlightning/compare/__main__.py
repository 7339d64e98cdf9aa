"""Several finished runs, one table and one figure: ``python -m bnlightning.compare <directory>``.

The exit status is 0 if everything is written, 1 if something of it cannot be written or read, 2 if the arguments are
wrong. A directory that cannot be written still gives the table on the console.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bnlightning.compare.comparison import NotWritten
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
    except NotWritten as error:
        error.comparison.print_tables()
        parser.exit(1, f"{error}\n")
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    except OSError as error:
        parser.exit(1, f"{str(error.filename or options.directory)!r} cannot be read ({error.strerror or error}).\n")
    comparison.print()


if __name__ == "__main__":
    main()
