import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bnlightning"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
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


@pytest.fixture
def lint_with(tmp_path):
    """Check the contracts of the package with lines added to some of its files."""

    def lint(lines):
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        shutil.copytree(PACKAGE, tmp_path / "bnlightning", ignore=shutil.ignore_patterns("__pycache__"))
        for name, line in lines.items():
            path = tmp_path / "bnlightning" / name
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
        return run_python(LINT_IMPORTS, cwd=tmp_path)

    return lint


@pytest.mark.parametrize(
    ("contract", "name", "line"),
    [
        ("Imports go down only", "monitors/__init__.py", "import bnlightning.writing.writers"),
        ("Imports go down only", "monitors/__init__.py", "import bnlightning.diagnosis"),
        ("Imports go down only", "nn/__init__.py", "import bnlightning.monitors"),
        ("Imports go down only", "models/__init__.py", "import bnlightning.callbacks"),
        ("Imports go down only", "callbacks/__init__.py", "import bnlightning.compare.runs"),
        ("Imports go down only", "a_room_without_a_place/__init__.py", ""),
        ("The grammar of names is a leaf", "compare/names.py", "import bnlightning._check"),
        ("The grammar of names is a leaf", "compare/names.py", "import bnlightning.compare.runs"),
        ("Numbers and findings know no logger and no picture", "diagnosis/__init__.py", "import tensorboard"),
        ("Numbers and findings know no logger and no picture", "monitors/__init__.py", "import matplotlib"),
    ],
)
def test_a_contract_can_fail(contract, name, line, lint_with):
    result = lint_with({name: line})
    assert result.returncode == 1, result.stdout
    assert f"{contract} BROKEN" in result.stdout


@pytest.mark.parametrize(
    ("contract", "library", "may"),
    [
        ("Only the application knows Hydra", "omegaconf", {"experiments"}),
        ("Only the application knows Hydra", "hydra", {"experiments"}),
        (
            "Below the callbacks nothing knows Lightning",
            "pytorch_lightning",
            {"callbacks", "compare", "data", "experiments", "models"},
        ),
        (
            "Below the callbacks nothing knows Lightning",
            "lightning",
            {"callbacks", "compare", "data", "experiments", "models"},
        ),
    ],
)
def test_a_contract_holds_in_every_room(contract, library, may, lint_with):
    result = lint_with({f"{room}/__init__.py": f"import {library}" for room in ROOMS})
    assert result.returncode == 1, result.stdout
    assert f"{contract} BROKEN" in result.stdout
    refused = set(re.findall(rf"^- *bnlightning\.(\w+) -> {library} \(l", result.stdout, re.MULTILINE))
    assert refused == set(ROOMS) - may, result.stdout


def test_every_room_may_use_the_grammar_of_names(lint_with):
    uses = {f"{room}/__init__.py": "import bnlightning.compare.names" for room in ROOMS if room != "compare"}
    result = lint_with({"compare/names.py": ""} | uses)
    assert result.returncode == 0, result.stdout


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def private_definitions(path):
    """Every private name that a file gives to something, attributes and its own name included."""
    found = {path.stem} if is_private(path.stem) else set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def names_used(tree):
    """Names that a test takes from somewhere: imports with their module, attributes and strings without."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bnlightning":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and not ast.unparse(node).startswith(("torch.", "nn.")):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            # Of a patch or of getattr.
            yield node.lineno, node.value


def foreign_private_names(path, package, tests):
    """Where a test file uses a private name of another room than the one it mirrors."""
    room = path.relative_to(tests).parts[0]
    own = set().union(*(private_definitions(file) for file in (package / room).rglob("*.py")))
    own |= private_definitions(path)
    # A private module beside the rooms has a test file of its own.
    beside = f"bnlightning._{path.stem.removeprefix('test_')}"
    others = set().union(*(private_definitions(file) for file in package.rglob("*.py"))) - own
    for line, name in names_used(ast.parse(path.read_text())):
        top, *parts = name.split(".")
        is_foreign = parts[:1] != [room] and any(map(is_private, parts)) if top == "bnlightning" else top in others
        if is_foreign and not f"{name}.".startswith(f"{beside}."):
            yield f"{path.relative_to(tests)}:{line}: {name}"


def test_tests_use_no_private_name_of_another_room():
    tests = ROOT / "tests"
    # This file's strings are examples.
    files = sorted(set(tests.rglob("*.py")) - {Path(__file__)})
    found = [use for path in files for use in foreign_private_names(path, PACKAGE, tests)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from bnlightning.monitors.schedule import _x", "bnlightning.monitors.schedule._x"),
        ("from bnlightning._check import check_number", "bnlightning._check.check_number"),
        ("from bnlightning._a import check_number", None),
        ("import bnlightning.compare._x", "bnlightning.compare._x"),
        ("monkeypatch.setattr('bnlightning.compare._x', None)", "bnlightning.compare._x"),
        ("module._of_models()", "_of_models"),
        ("monkeypatch.setattr(module, '_of_models', None)", "_of_models"),
        ("module._of_nn()", None),
        ("from bnlightning.nn.swap import _x", None),
        ("torch._dynamo.reset()", None),
    ],
)
def test_a_private_name_of_another_room_is_found(code, name, tmp_path):
    for file, text in {
        "bnlightning/models/a.py": "self._of_models = 1",
        "bnlightning/nn/a.py": "def _of_nn(): ...",
        "tests/nn/test_a.py": code,
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = list(foreign_private_names(path, tmp_path / "bnlightning", tmp_path / "tests"))
    assert found == ([] if name is None else [f"nn/test_a.py:1: {name}"])


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
