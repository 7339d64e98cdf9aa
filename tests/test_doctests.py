"""The examples in the package's docstrings run after these imports, and all public names have one.

import lightning, numpy as np, torch
from torch import nn
from bnlightning import *
from <the module> import *
"""

import doctest
import importlib
import pkgutil
import types

import lightning
import numpy as np
import pytest
import torch
from torch import nn

import bnlightning

# The imports that the examples leave out, besides that of the name they belong to.
IMPORTED = {"lightning": lightning, "np": np, "torch": torch, "nn": nn} | {
    name: getattr(bnlightning, name) for name in bnlightning.__all__
}

# An example of these would have to train several runs first.
WITHOUT = {"Comparison", "compare_runs"}


def examples() -> list[doctest.DocTest]:
    """Return every docstring with an example in any module of the package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for info in pkgutil.walk_packages(bnlightning.__path__, "bnlightning."):
        # Importing a __main__ runs it.
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == info.name}
            found += finder.find(module, globs=own | IMPORTED)
    return [test for test in found if test.examples]


EXAMPLES = examples()


def run(test: doctest.DocTest) -> tuple[doctest.TestResults, str]:
    """Run the examples; return the number of failures and doctest's report of them."""
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return results, "".join(report)


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name.removeprefix("bnlightning."))
def test_example_runs(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    results, report = run(test)
    assert results.attempted and not results.failed, report


def test_examples_are_found():
    names = {test.name for test in EXAMPLES}
    assert {"bnlightning.nn.batch_norm.BatchNorm1d", "bnlightning.callbacks.swap_norm.SwapNorm"} <= names


@pytest.mark.parametrize("text", [">>> 1 + 1\n3\n", ">>> import warnings; warnings.warn('beware')\n", ">>> unknown\n"])
def test_a_wrong_example_fails(text):
    results, report = run(doctest.DocTestParser().get_doctest(text, {}, "wrong", None, 0))
    assert results.failed == 1 and text.splitlines()[0].removeprefix(">>> ") in report


def public_names():
    """Return the public classes and functions by name."""
    names = {name: getattr(bnlightning, name) for name in bnlightning.__all__} | vars(bnlightning.nn)
    described = (type, types.FunctionType)
    return {name: value for name, value in names.items() if isinstance(value, described) and name not in WITHOUT}


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_has_an_example(name):
    assert ">>> " in public_names()[name].__doc__
