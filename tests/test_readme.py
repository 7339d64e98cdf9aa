import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_mnist

from bnlightning import CONF_DIR

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python -m (bnlightning\.\w+) ([^`\n]*)", README)))


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_examples_run_as_they_stand(code, tmp_path):
    write_mnist(tmp_path / "data", num_train=5400)
    # With Lightning's usual warnings: a reader sees them, too.
    result = subprocess.run(
        [sys.executable, "-c", f"import torch\ntorch.set_num_threads(1)\n{code}"],
        cwd=tmp_path,
        env={**os.environ, "BNLIGHTNING_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert ("Trainer(" in code) == bool(list(tmp_path.glob("lightning_logs/version_0/events.out.tfevents.*")))


@pytest.mark.slow
def test_commands_run(run_module):
    """Those with an experiment are run in test_train.py; here that they name one that exists, and the rest."""
    assert ("bnlightning.train", "--help") in COMMANDS and ("bnlightning.compare", "DIRECTORY") in COMMANDS
    # The one with a directory of the user's own is run in test_train.py, too.
    commands = [command for command in COMMANDS if not command[1].startswith("--config-dir")]
    for module, arguments in commands:
        if arguments.startswith("+experiment="):
            assert (CONF_DIR / "experiment" / f"{arguments.removeprefix('+experiment=')}.yaml").is_file(), arguments
            continue
        if arguments == "DIRECTORY":
            assert run_module("bnlightning.train", "trainer.max_steps=10", "output_dir=DIRECTORY").returncode == 0
        result = run_module(module, arguments)
        assert result.returncode == 0, result.stderr


def test_the_first_screen_holds_the_two_commands_that_ci_runs():
    screen = "\n".join(README.splitlines()[:25])
    assert "pip install -e . && python -m bnlightning.train +experiment=tanh" in screen
    command = 'pip install -e ".[test]" && python -m pytest'
    # Which takes it from here.
    assert f"Set up and run the tests:\n\n```bash\n{command}\n```" in screen


def test_names_and_files_exist():
    import bnlightning

    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (root / target).exists(), target
    for name in re.findall(r"`(BatchNorm\dd|Lit\w+|\w+Monitor|\w+DataModule|compare_runs)`", README):
        assert name in bnlightning.__all__
