"""What the benchmarks have in common: rounds in which everything takes its turn, ratios, tables."""

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

Cells = dict[str, str]

# By default glibc hands large blocks back to the system and fetches them anew, page by page and whenever it likes: that
# alone moves a large layer's time by a factor of two. Freed memory stays with the process instead, for all its threads.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}


def run(main: Callable[[], None], **environment: str) -> None:
    """Call ``main`` in a process with these variables, and memory that stays with it."""
    environment = {**ALLOCATOR, **environment}
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
    main()


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in an order that rotates."""
    names = list(names)
    for turn in range(rounds):
        first = turn % len(names)
        yield from names[first:] + names[:first]


def quartiles(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Of the rounds' ratios: the lower quartile, the median, the upper quartile."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return low, median, high


def print_table(title: str, corner: str, columns: dict[str, Cells]) -> None:
    """As Markdown; the rows are those of the column that has most, with nothing where another has none."""
    print(f"\n{title}\n\n| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in max(columns.values(), key=len):
        print(f"| {name} | {' | '.join(cells.get(name, '') for cells in columns.values())} |")
