"""What stands in two files of the project stands there alike."""

import re
from pathlib import Path

import yaml

import bnlightning

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def dependencies():
    """What the package needs at run time."""
    return re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1])


def test_the_oldest_versions_are_those_that_are_allowed():
    allowed = dict(re.match(r"([\w-]+)>=([\d.]+)", need).groups() for need in dependencies())
    constraints = (ROOT / ".github" / "constraints-oldest.txt").read_text(encoding="utf-8")
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", constraints, re.MULTILINE))
    assert {name: as_numbers(version) for name, version in oldest.items()} == {
        name: as_numbers(version) for name, version in allowed.items()
    }


def as_numbers(version):
    """Three of them: 2.5 is 2.5.0."""
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (3 - len(numbers))


def test_pre_commit_has_the_same_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    needed = {need for repo in hooks for hook in repo["hooks"] for need in hook["additional_dependencies"]}
    assert len(needed) == 3 + len(dependencies())
    for need in needed:
        assert f'    "{need}",\n' in PYPROJECT


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bnlightning.__version__
    for url in (citation["repository-code"], citation["url"]):
        assert f'"{url}"' in PYPROJECT


def test_github_can_read_its_files():
    files = sorted((ROOT / ".github").rglob("*.yml"))
    assert len(files) >= 5
    for path in files:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        # YAML takes "on" for a truth value.
        needed = {"name", True, "jobs"} if path.parent.name == "workflows" else {"name", "body"}
        assert needed <= loaded.keys() or path.stem == "config", path
