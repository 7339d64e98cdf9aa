"""The notebooks run from top to bottom, are committed without outputs and use public names only."""

import ast
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

import bnlightning

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def _code_cells(path):
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


@pytest.mark.slow
@each_notebook
def test_notebook_runs(path, tmp_path, monkeypatch):
    for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    # Without directories to search there is only the kernel of this interpreter, whatever is registered elsewhere.
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(_read(path), km=manager, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(cleanup_kc=True)


@each_notebook
def test_notebook_is_committed_without_outputs(path):
    for cell in _code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@each_notebook
def test_notebook_imports_public_names_only(path):
    imported = set()
    for cell in _code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bnlightning":
                assert node.module == "bnlightning"
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.partition(".")[0] == "bnlightning"]
    assert imported
    assert imported <= set(bnlightning.__all__)
