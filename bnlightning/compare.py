"""Several finished runs, one table and one figure: ``python -m bnlightning.compare <directory>``."""

import argparse
from collections.abc import Sequence

from bnlightning._comparison import Comparison as Comparison
from bnlightning._comparison import compare_runs as compare_runs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bnlightning.compare", description="Compare finished runs.")
    parser.add_argument("directory", help="with one run a subdirectory, at any depth")
    parser.add_argument("--metric", default="val/loss", help="the tag of the cost (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        comparison = compare_runs(options.directory, options.metric)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    comparison.print()


if __name__ == "__main__":
    main()
