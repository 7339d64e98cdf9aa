"""How long the first command takes, everything it writes included, beside importing Lightning.

    python benchmarks/startup.py [rounds]

Both are whole processes, run in turns; the figure is the median of the rounds' ratios, with their quartiles.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import lightning
import torch

BUDGET = 2.5
IMPORT = [sys.executable, "-c", "import lightning"]
EXPERIMENT = [sys.executable, "-m", "bnlightning.train", "+experiment=tanh"]


def seconds(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        subprocess.run(
            command, cwd=directory, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    # The first run of each fills the disk cache and compiles the modules.
    seconds(IMPORT), seconds(EXPERIMENT)
    pairs = [(seconds(IMPORT), seconds(EXPERIMENT)) for _ in range(rounds)]
    imports, experiments = zip(*pairs, strict=True)
    low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}, {rounds} rounds\n")
    print("| what | median seconds |\n|---|---|")
    print(f"| `python -c 'import lightning'` | {statistics.median(imports):.2f} |")
    print(f"| `python -m bnlightning.train +experiment=tanh` | {statistics.median(experiments):.2f} |")
    print(f"| ratio, median [quartiles] (budget {BUDGET}) | {ratio:.2f} [{low:.2f}, {high:.2f}] |")


if __name__ == "__main__":
    main()
