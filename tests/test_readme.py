import re
from pathlib import Path

import pytest
from helpers import python_blocks, run_example

import bnlightning
from bnlightning import CONF_DIR

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = python_blocks(README)
COMMANDS = sorted(set(re.findall(r"python -m (bnlightning\.\w+) ([^`\n]*)", README)))


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_as_they_stand(code, tmp_path):
    run_example(code, tmp_path)


@pytest.mark.slow
def test_commands_run(run_module):
    """The experiments are run in tests/experiments: here that those named exist, and that the other commands run."""
    assert ("bnlightning.train", "--help") in COMMANDS and ("bnlightning.compare", "DIRECTORY") in COMMANDS
    for module, arguments in COMMANDS:
        if arguments.startswith("+experiment="):
            assert (CONF_DIR / "experiment" / f"{arguments.removeprefix('+experiment=')}.yaml").is_file(), arguments
            continue
        if arguments == "DIRECTORY":
            assert run_module("bnlightning.train", "trainer.max_steps=10", "output_dir=DIRECTORY").returncode == 0
        result = run_module(module, arguments)
        assert result.returncode == 0, result.stderr


def test_it_is_read_in_one_go():
    assert len(README.splitlines()) <= 150


def test_the_first_screen_holds_the_figure_and_the_two_commands_that_ci_runs():
    screen = "\n".join(README.splitlines()[:25])
    assert "(docs/tanh.png)" in screen
    assert "pip install -e . && python -m bnlightning.train +experiment=tanh" in screen
    command = 'pip install -e ".[test]" && python -m pytest'
    # Which takes it from here.
    assert f"Set up and run the tests:\n\n```bash\n{command}\n```" in screen


def test_names_and_files_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
    names = set(
        re.findall(r"`(\w*(?:BatchNorm|Monitor|DataModule|SwapNorm)\w*|Lit\w+|swap_norm|compare_runs)[`(]", README)
    )
    assert {"ActivationMonitor", "swap_norm", "SwapNorm"} <= names <= set(bnlightning.__all__)
