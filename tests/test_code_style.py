import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The console script is not always on PATH, and import-linter has no `python -m`.
LINT_IMPORTS = ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]


def run_python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(cwd), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-m", "ruff", "check", "."], id="ruff check"),
        pytest.param(["-m", "ruff", "format", "--check", "."], id="ruff format"),
        pytest.param(["-m", "mypy"], id="mypy"),
        pytest.param(LINT_IMPORTS, id="lint-imports"),
    ],
)
def test_tool_finds_nothing(arguments):
    result = run_python(arguments, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_import_contract_can_fail(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "bnlightning", tmp_path / "bnlightning", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "bnlightning" / "models" / "regression.py").open("a", encoding="utf-8") as file:
        file.write("\nimport omegaconf\n")

    result = run_python(LINT_IMPORTS, cwd=tmp_path)

    assert result.returncode == 1, result.stdout
    assert "Only the application knows Hydra BROKEN" in result.stdout
    assert "bnlightning.models.regression -> omegaconf" in result.stdout


def test_nothing_tracked_reaches_outside_the_repository():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or git is not installed")
    needle = "../" + "shared"
    # A checkout of another owner, as in a container, is refused otherwise.
    command = ["git", "-c", f"safe.directory={ROOT}", "grep", "--files-with-matches", "--fixed-strings", "-e", needle]
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    # 1: found nowhere.
    assert result.returncode in (0, 1), result.stderr
    assert set(result.stdout.splitlines()) <= {".ci/run"}
