import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, **env: str) -> str:
    # A sweep in this process may have left its directory, which would become that of the command's runs.
    inherited = {key: value for key, value in os.environ.items() if key != "BNLIGHTNING_OUTPUT_DIR"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | {"PYTHONIOENCODING": "utf-8"} | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    # Without --wheel, the wheel is built from the sdist; without isolation, nothing is downloaded.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)], cwd=directory)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


@pytest.fixture
def run_from_wheel(site, tmp_path):
    def run_python(*arguments: str) -> str:
        return run([sys.executable, *arguments], cwd=tmp_path, PYTHONPATH=str(site))

    return run_python


def test_wheel_has_the_tracked_configuration(wheel):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or git is not installed")
    tracked = run(["git", "-c", f"safe.directory={ROOT}", "ls-files", "conf"], cwd=ROOT).splitlines()
    prefix = "bnlightning/"
    with zipfile.ZipFile(wheel) as archive:
        shipped = [name.removeprefix(prefix) for name in archive.namelist() if name.startswith(f"{prefix}conf/")]
    assert "conf/train.yaml" in tracked
    assert sorted(shipped) == sorted(tracked)


def test_wheel_has_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bnlightning").rglob("*.py")}
    assert modules | {"bnlightning/py.typed"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bnlightning"}


def test_installed_package_uses_its_own_configuration(run_from_wheel, site):
    code = "import bnlightning; print(bnlightning.__file__); print(bnlightning.CONF_DIR)"
    module, conf = map(Path, run_from_wheel("-c", code).splitlines())
    assert module.resolve() == (site / "bnlightning" / "__init__.py").resolve()
    assert conf.resolve() == (site / "bnlightning" / "conf").resolve()


def test_installed_command_shows_its_help(run_from_wheel):
    output = run_from_wheel("-m", "bnlightning.train", "--help")
    experiments = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    assert f"experiment: {', '.join(experiments)}\n" in output


def test_installed_command_runs_an_experiment(run_from_wheel, tmp_path):
    run_from_wheel("-m", "bnlightning.train", "+experiment=tanh", "trainer.max_steps=5", "output_dir=runs")
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == {"none", "custom", "comparison"}
    assert (tmp_path / "runs" / "comparison.png").is_file()
