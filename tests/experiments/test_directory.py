import re
import time

import pytest

from bnlightning.experiments.directory import SweepDirectory

from .commands import assert_same_results, start


@pytest.mark.slow
def test_what_was_there_before_stays(run_module, tmp_path):
    first = run_module("bnlightning.train", "output_dir=out", "trainer.max_steps=5")
    assert first.returncode == 0
    (tmp_path / "out" / "custom" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ["output_dir=out"],
        ["output_dir=out", "model.depth=0"],
        ["output_dir=empty", "model.depth=0"],
        ["output_dir=empty", "trainer.devices=none"],
        ["output_dir=.", "model.depth=0"],
        ["output_dir=.", "model.norm=.."],
        ["output_dir=empty", f"model.norm={tmp_path / 'out'}"],
        ["hydra.mode=RUN"],
        ["hydra.run.dir=."],
    ):
        result = run_module("bnlightning.train", "trainer.max_steps=5", *arguments)
        assert result.returncode == 1, arguments
        assert sorted(tmp_path.rglob("*")) == before, arguments
    again = run_module("bnlightning.train", "output_dir=out")
    assert "output_dir=" in again.stderr and "holds runs already: give another" in again.stderr
    run_module("bnlightning.train", "--help", BNLIGHTNING_OUTPUT_DIR=str(tmp_path / "empty"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_killed_sweep_is_resumed_to_what_an_unbroken_one_gives(n_jobs, run_module, tmp_path):
    names = {f"custom_seed-{seed}" for seed in (1, 2, 3)}
    sweep = (
        "seed=1,2,3",
        "trainer.max_steps=200",
        "callbacks.activation_monitor.every_n_steps=100",
        f"n_jobs={n_jobs}",
    )
    whole = run_module("bnlightning.train", *sweep, "output_dir=whole")
    assert whole.returncode == 0, whole.stderr

    def states():
        finished = {path.parent.name for path in tmp_path.glob("part/*/finished")}
        return finished, {path.parent.name for path in tmp_path.glob("part/*/events.out.tfevents.*")} - finished

    process = start(tmp_path, *sweep, "output_dir=part")
    # The last run has begun, and so has all of its steps before it.
    while sum(map(len, states())) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    # Ends when no process is left that could write, the workers included.
    process.communicate(timeout=60)
    finished, begun = states()
    assert finished and begun
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for name in finished
        for path in (tmp_path / "part" / name).rglob("*")
        if path.is_file()
    }
    result = run_module("bnlightning.train", *sweep, "output_dir=part", "resume=true")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert {line for line in lines if line.startswith("Finished already: ")} == {
        f"Finished already: {name.replace('custom_seed-', 'batch norm (ours), seed ')}" for name in finished
    }
    assert {line for line in lines if line.startswith("Training ")} == {
        f"Training {name.replace('custom_seed-', 'batch norm (ours), seed ')} on 1 thread" for name in names - finished
    }
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    for name in names:
        assert len(list((tmp_path / "part" / name).glob("events.out.tfevents.*"))) == 1
        assert_same_results(tmp_path / "whole" / name, tmp_path / "part" / name)
    assert (tmp_path / "part" / "comparison.png").is_file()


@pytest.mark.slow
def test_a_sweep_is_resumed_only_as_it_was(run_module, tmp_path):
    sweep = ("seed=1,2", "trainer.max_steps=5", "output_dir=out")
    assert run_module("bnlightning.train", *sweep).returncode == 0
    (tmp_path / "out" / "custom_seed-2" / "finished").unlink()
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    checkpoint = "ckpt_path=out/custom_seed-2/checkpoints/last.ckpt"
    for arguments, message in (
        ([*sweep], r"^output_dir='.*out' holds runs already: give another, .*resume=true"),
        (
            [*sweep, "resume=true", "model.weight_std=2.0", "trainer.max_steps=6"],
            r"^resume=true is not possible: '.*out/custom_seed-1' finished with "
            r"model\.weight_std=1\.0, not 2\.0; trainer\.max_steps=5, not 6\.",
        ),
        (["seed=1,2", "resume=true"], r"^resume=true needs to know which sweep: give its directory, output_dir=PATH"),
        (
            ["seed=2,3", "trainer.max_steps=6", "output_dir=out", "resume=true", checkpoint],
            r"^ckpt_path='.*' is of a run that resume=true begins again",
        ),
    ):
        result = run_module("bnlightning.train", *arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert re.search(message, result.stderr, re.MULTILINE), result.stderr
        assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    # Another number of runs is none of the configuration of each.
    (tmp_path / "out" / "custom_seed-3").mkdir()
    (tmp_path / "out" / "custom_seed-3" / "notes.txt").write_text("mine")
    fresh = run_module("bnlightning.train", "seed=1", "trainer.max_steps=5", "output_dir=new", "resume=true")
    assert fresh.stdout.startswith(f"Nothing to resume in {tmp_path / 'new'}: all runs are trained.\n")
    result = run_module("bnlightning.train", *sweep, "seed=1,2,3", "resume=true", "n_jobs=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Finished already: batch norm (ours), seed 1\n")
    assert (tmp_path / "out" / "custom_seed-3" / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.glob("out/*/finished"))) == 3


def test_a_comparison_alone_is_no_run(tmp_path):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "events.out.tfevents.1.comparison").touch()
    assert not SweepDirectory(tmp_path, [], set()).holds_runs
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "events.out.tfevents.1").touch()
    assert SweepDirectory(tmp_path, [], set()).holds_runs


@pytest.mark.slow
def test_a_path_that_the_locale_has_no_letters_for_is_refused(run_module, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run_module("bnlightning.train", "output_dir=\u00fc", **ascii_only)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(
        r"output_dir='.*' is no text in this locale: set PYTHONUTF8=1 or LC_ALL=C\.UTF-8\.\n", result.stderr
    )
    assert list(tmp_path.iterdir()) == []
