import csv
import dataclasses
import io
import math

import matplotlib.image
import numpy as np
import pytest
from helpers import read_events
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from bnlightning import compare_runs
from bnlightning.compare.comparison import NotWritten
from bnlightning.compare.figures.overview import draw as draw_overview
from bnlightning.compare.runs import measured_in_tests, read_run


def test_compares_and_replaces_an_earlier_comparison(finished):
    first = compare_runs(finished)
    comparison = compare_runs(str(finished))
    assert comparison.rows == first.rows
    none, custom = comparison.rows
    assert [row["variant"] for row in comparison.rows] == ["no norm", "batch norm (ours)"]
    assert none["seeds"] == "1, 2"
    costs = [read_run(finished / f"custom_seed-{seed}", finished).last("val/loss") for seed in (1, 2)]
    assert custom["final cost"].startswith(f"{np.median(costs):.4g} [")
    assert none["first non-finite"].endswith("(1 of 2 runs)") and custom["first non-finite"] == "none seen"
    assert len(comparison.notes) == 1 and comparison.notes[0].startswith("no norm (1 of 2 runs) diverged: after ")
    with (finished / "comparison.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row.pop("directory") for row in written] == ["none_seed-1, none_seed-2", "custom_seed-1, custom_seed-2"]
    assert written == comparison.rows
    assert (finished / "comparison.md").read_text() == comparison.markdown
    assert comparison.markdown.splitlines()[2].startswith("| no norm | 1, 2 | ")
    pixels = matplotlib.image.imread(comparison.figure)
    events = read_events(finished / "comparison")
    (image,) = events.Images("comparison")
    assert (image.height, image.width) == pixels.shape[:2]
    assert image.encoded_image_string == comparison.figure.read_bytes()
    assert "figure of the comparison" in events.SummaryMetadata("comparison").summary_description
    # One event file, in a directory of its own.
    assert [path.parent.name for path in finished.rglob("*.comparison")] == ["comparison"]


def test_a_comparison_of_an_earlier_version_is_replaced(tmp_path, write_run):
    for name in ("a", "b"):
        write_run(tmp_path / name, val__loss={0: 1.0})
    with SummaryWriter(str(tmp_path), filename_suffix=".comparison") as writer:
        writer.add_image("comparison", np.zeros((3, 2, 2)))
    assert [row["variant"] for row in compare_runs(tmp_path).rows] == ["a", "b"]
    assert [path.parent.name for path in tmp_path.rglob("*.comparison")] == ["comparison"]


def test_a_single_runs_directory_is_compared(tmp_path, write_run):
    write_run(tmp_path / "custom", val__loss={0: 2.0, 10: 1.0})
    for _ in range(2):
        (row,) = compare_runs(tmp_path / "custom").rows
        assert (row["variant"], row["final cost"]) == ("batch norm (ours)", "1")
    # The directory above has the same run, and no other.
    assert [row["variant"] for row in compare_runs(tmp_path).rows] == ["batch norm (ours)"]


def test_a_run_that_was_cut_off_is_told(tmp_path, write_run):
    for name, app in (
        ("custom_seed-1", "python -m bnlightning.train"),
        ("custom_seed-2", "python -m bnlightning.train"),
        ("none", "python -m bnlightning.train"),
        ("torch", "another"),
    ):
        write_run(tmp_path / name, val__loss={0: 2.0, 200: 1.0}, train__loss={205: 1.0})
        (tmp_path / name / ".hydra").mkdir()
        (tmp_path / name / ".hydra/hydra.yaml").write_text(f"hydra:\n  help:\n    app_name: {app}\n")
    (tmp_path / "custom_seed-1/finished").touch()
    assert compare_runs(tmp_path).notes == [
        "no norm is not finished: it stops at step 205.",
        "batch norm (ours) (1 of 2 runs) is not finished: it stops at step 205.",
    ]
    for name in ("custom_seed-2", "none"):
        (tmp_path / name / "finished").touch()
    assert compare_runs(tmp_path).notes == []


def test_settings_are_told_in_words(tmp_path, write_run):
    for name in ("none", "custom"):
        for rate in (0.1, 1.0):
            directory = tmp_path / f"{name}_depth-10_learning_rate-{rate}"
            write_run(directory, val__acc=[0.1, 0.2], test__acc=[0.3], published__val__acc={10: rate})
    comparison = compare_runs(tmp_path, metric="val/acc")
    texts = [
        f"{norm}, depth 10, learning rate {rate}" for norm in ("no norm", "batch norm (ours)") for rate in (0.1, 1.0)
    ]
    assert [row["variant"] for row in comparison.rows] == texts
    assert [*comparison.results[0]] == ["test metric", *texts]
    assert [*comparison.curve[0]] == ["step", *(each for text in texts for each in (f"published ({text})", text))]
    assert all(note.startswith(text) for note, text in zip(comparison.notes, texts, strict=True))
    with (tmp_path / "comparison.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == texts
    assert not any(name in comparison.markdown for name in ("none", "custom", "learning_rate"))


def test_other_peoples_runs_need_nothing_but_a_scalar(tmp_path):
    for name, offset in (("small", 0.0), ("large", 1.0)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step in range(5):
                writer.add_scalar("loss", offset + 1 / (step + 1), step)
    with pytest.raises(ValueError, match=r"metric='val/loss' was logged by no run in .*: choose one of loss"):
        compare_runs(tmp_path)
    comparison = compare_runs(tmp_path, metric="loss")
    assert [(row["variant"], row["final cost"], row["seeds"]) for row in comparison.rows] == [
        ("large", "1.2", "1 run"),
        ("small", "0.2", "1 run"),
    ]
    assert comparison.figure.stat().st_size > 10_000


def test_what_the_tests_measured_is_a_table_beside_what_was_published(with_tests, capsys):
    comparison = compare_runs(with_tests)
    results = {row["test metric"]: row for row in comparison.results}
    assert results["running_var"] == {
        "test metric": "running_var",
        "published": "0.74709475",
        "keras": "0.74709475",
        "pytorch": "0.99418956",
    }
    assert results["running_mean"]["pytorch"] == results["running_mean"]["published"] == "0.3514931"
    assert results["scale"]["published"] == "-" and results["loss"]["keras"] == "-"
    marked = [line for line in comparison.markdown.splitlines() if "≠" in line]
    assert marked == ["| running_var | 0.74709475 | 0.74709475 | ≠ 0.99418956 |"]
    assert [note.partition(" = ")[0] for note in comparison.notes] == [
        "keras: running variance 0.7470948",
        "pytorch: running variance 0.9941896",
    ]
    comparison.print()
    assert "≠ 0.99418956" in (printed := capsys.readouterr().out) and all(note in printed for note in comparison.notes)
    with (with_tests / "comparison.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["published", "keras", "pytorch"]
    assert rows["published"]["final cost"] == "-" and rows["published"]["test/running_var"] == "0.74709475"
    assert rows["pytorch"]["test/running_var"] == "0.99418956" and rows["keras"]["test/loss"] == "-"


def test_of_accuracies_the_higher_is_the_better(tmp_path, write_run):
    for seed, last in enumerate([0.9, 0.8, math.nan]):
        write_run(tmp_path / f"run_seed-{seed}", val__acc={0: 0.01, 10: 0.5, 20: last})
    comparison = compare_runs(tmp_path, metric="val/acc")
    (row,) = comparison.rows
    assert "final cost" not in row and row["val/acc"].startswith("0.8 [")
    drawn = draw_overview({"run": comparison.runs}, "val/acc", "title", [])
    axes = next(axes for axes in drawn.axes if axes.get_title(loc="left").startswith("Validation accuracy"))
    assert axes.get_yscale() == "linear" and axes.get_lines()[0].get_ydata()[-1] == pytest.approx(0.8)
    low, high = axes.get_ylim()
    # From the first evaluation of a trained network on.
    assert 0.45 < low < 0.5 and 0.8 < high < 1.0


def test_tests_without_publications_stand_in_the_first_table_and_empty_columns_nowhere(tmp_path, write_run):
    for name, value in (("a", 0.912345678), ("b", 0.5)):
        write_run(tmp_path / name, val__acc={0: 0.1, 10: 0.5, 20: value}, test__acc={20: value})
    comparison = compare_runs(tmp_path, metric="val/acc")
    lines = comparison.markdown.splitlines()
    assert lines[0] == "| variant | seeds | val/acc | seconds | test/acc |" and len(lines) == 4
    assert lines[2].endswith(" | 0.9123 |") and lines[3].endswith(" | 0.5 |")
    assert comparison.results == [{"test metric": "acc", "a": "0.9123457", "b": "0.5"}]
    # Its dots would say nothing beside the curves.
    drawn = draw_overview({run.variant: [run] for run in comparison.runs}, "val/acc", "title", [])
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["Validation accuracy"]


def test_a_published_curve_is_compared_step_by_step(tmp_path, capsys, write_run):
    published = {10: 0.5, 20: 0.6123, 30: 0.7}
    write_run(tmp_path / "a", published__val__acc=published, val__acc={0: 0.1, 10: 0.5, 20: 0.6125, 30: 0.65})
    # Stopped early.
    write_run(tmp_path / "b", published__val__acc={10: 0.5}, val__acc={0: 0.1, 10: 0.5})
    comparison = compare_runs(tmp_path, metric="val/acc")
    assert comparison.curve == [
        {"step": "10", "published": "0.5000", "a": "0.5000", "b": "0.5000"},
        {"step": "20", "published": "0.6123", "a": "0.6125", "b": "-"},
        {"step": "30", "published": "0.7000", "a": "0.6500", "b": "-"},
    ]
    assert comparison.results == []
    assert "| 20 | 0.6123 | 0.6125 (+0.0002) | - |" in (tmp_path / "comparison.md").read_text()
    assert comparison.notes == [
        "a: 1 of 3 values of val/acc is exactly the published one. The largest difference is 0.0500, at step 30.",
        "b: 1 of 1 values of val/acc is exactly the published one.",
    ]
    comparison.print()
    assert "0.6500 (-0.0500)" in capsys.readouterr().out
    with (tmp_path / "comparison_curve.csv").open() as file:
        assert list(csv.DictReader(file)) == comparison.curve
    axes = draw_overview({run.variant: [run] for run in comparison.runs}, "val/acc", "title", []).axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "published"]
    assert line.get_color() == "black" and line.get_linestyle() == "--"
    assert line.get_xdata().tolist() == [10, 20, 30]
    np.testing.assert_allclose(line.get_ydata(), [*published.values()], rtol=1e-6)
    # Nothing of it is left where the next comparison has none.
    write_run(tmp_path / "a", val__loss={0: 1.0})
    assert compare_runs(tmp_path).curve == [] and not (tmp_path / "comparison_curve.csv").exists()


def test_variants_with_publications_of_their_own_are_compared_with_those(tmp_path, write_run):
    for name, value in (("a", 0.5), ("b", 0.25)):
        write_run(tmp_path / name, published__val__acc={10: value}, val__acc={0: 0.1, 10: 0.5})
    comparison = compare_runs(tmp_path, metric="val/acc")
    row = {"step": "10", "published (a)": "0.5000", "a": "0.5000", "published (b)": "0.2500", "b": "0.5000"}
    assert comparison.curve == [row]
    assert "| 10 | 0.5000 | 0.5000 | 0.2500 | 0.5000 (+0.2500) |" in comparison.markdown


def test_variants_are_sorted_by_their_numbers(tmp_path, write_run):
    for name in ("custom_rate-10", "custom_rate-2", "none_rate-1", "custom_rate-1e-05", "custom_rate-0.001"):
        write_run(tmp_path / name, val__loss={0: 1.0})
    variants = [row["variant"] for row in compare_runs(tmp_path).rows]
    assert variants[0] == "no norm, rate 1"
    assert [name.rpartition(" ")[2] for name in variants[1:]] == ["1e-05", "0.001", "2", "10"]


def test_a_figure_of_ones_own_replaces_the_default_one(finished):
    called = []

    def draw(variants, metric, title, notes):
        called.append(([*variants], metric, title, len(notes)))
        return Figure(figsize=(3.0, 2.0), dpi=100)

    comparison = compare_runs(finished, draw=draw)
    assert called == [(["none", "custom"], "val/loss", finished.name, 1)]
    assert matplotlib.image.imread(comparison.figure).shape[:2] == (200, 300)


def test_several_seeds_give_a_median_or_what_all_of_them_gave(tmp_path):
    for seed, (changing, diverging) in enumerate([(1.0, 1.0), (2.0, math.nan), (4.0, math.inf)]):
        with SummaryWriter(str(tmp_path / f"run_seed-{seed}")) as writer:
            for tag, value in (("val/loss", 1.0), ("test/a", changing), ("test/b", 1 / 3), ("test/c", diverging)):
                writer.add_scalar(tag, value, 0)
    comparison = compare_runs(tmp_path)
    assert [row["run"] for row in comparison.results] == ["2 [1.5, 3]", "0.33333334", "inf [1, inf]"]
    assert list(measured_in_tests({"run": comparison.runs})) == ["a", "b", "c"]


def test_no_setting_of_matplotlib_changes_the_figure(tmp_path, write_run):
    write_run(tmp_path / "none", val__loss={0: 1.0, 10: 0.5, 20: 0.2})
    expected = compare_runs(tmp_path).figure.read_bytes()
    settings = {
        "savefig.dpi": 30,
        "text.usetex": True,
        "font.size": 30,
        "axes.facecolor": "red",
        "savefig.bbox": "tight",
    }
    with matplotlib.rc_context(settings):
        assert compare_runs(tmp_path).figure.read_bytes() == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_what_cannot_be_written_still_has_tables(tmp_path, write_run, capsys):
    write_run(tmp_path / "custom", val__loss={0: 1.0})
    # In the place of a file.
    (tmp_path / "comparison.md").mkdir()
    with pytest.raises(
        NotWritten, match=r"comparison\.md' cannot be written \(Is a directory\)\. Make room"
    ) as failure:
        compare_runs(tmp_path)
    failure.value.comparison.print_tables()
    assert "batch norm (ours)" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "comparison").exists()


def test_a_directory_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, what in (("nowhere", "does not exist"), ("file", "is a file")):
        with pytest.raises(ValueError, match=rf"directory='.*{name}' {what}: give the directory that holds the runs"):
            compare_runs(tmp_path / name)
    # Of whoever runs as root nobody asks.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
        compare_runs(tmp_path)


def test_tables_are_printed_in_the_characters_that_there_are(with_tests, monkeypatch):
    comparison = compare_runs(with_tests)
    for encoding, mark in (("utf-8", "≠ 0.99418956"), ("ascii", "!= 0.99418956"), ("latin-1", "!= 0.99418956")):
        output = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding=encoding, write_through=True))
        dataclasses.replace(comparison, notes=["größer"]).print()
        text = output.getvalue().decode(encoding)
        assert mark in text and ("gr\\xf6\\xdfer" if encoding == "ascii" else "größer") in text
