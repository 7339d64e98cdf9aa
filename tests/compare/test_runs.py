import math

import numpy as np
import pytest
from helpers import read_events, scalar
from torch.utils.tensorboard import SummaryWriter

from bnlightning import SyntheticRegressionDataModule, compare_runs
from bnlightning.compare.runs import (
    curves,
    digits,
    find_runs,
    is_higher_better,
    labels,
    measured_in_tests,
    published_curves,
    quartiles,
    read_run,
    worst,
)


def test_reads_back_what_was_written(finished):
    assert [path.name for path in find_runs(finished)] == [
        "custom_seed-1", "custom_seed-2", "none_seed-1", "none_seed-2"
    ]  # fmt: skip
    run = read_run(finished / "custom_seed-2", finished)
    assert (run.variant, run.seed, run.first_nonfinite) == ("custom", 2, None)
    events = read_events(run.path)
    steps, values = run.scalars["val/loss"]
    assert steps.tolist() == [0, 5, 10, 15, 20]
    # By step: TensorBoard reads files of one second in the order of their names, 10 before 9.
    assert values.tolist() == [scalar(events, "val/loss")[step] for step in steps.tolist()]
    histogram = run.histograms["layer_val_hist/net.act1"][1]
    raw = {item.step: item.histogram_value for item in events.Histograms("layer_val_hist/net.act1")}[10]
    assert histogram.step == 10 and histogram.edges.tolist() == [raw.min, *raw.bucket_limit]
    assert histogram.counts.sum() == 200 * 8
    step, points = run.predictions[-1]
    data = SyntheticRegressionDataModule(num_points=200, seed=2)
    data.setup("fit")
    assert step == 20 and points.shape == (200, 3)
    np.testing.assert_array_equal(points[:, 0], data.x[:, 0])
    np.testing.assert_array_equal(points[:, 1], data.y[:, 0])
    assert np.mean((points[:, 1] - points[:, 2]) ** 2) == pytest.approx(values[-1], rel=1e-5)
    diverged = read_run(finished / "none_seed-2", finished)
    assert diverged.first_nonfinite is not None and not math.isfinite(diverged.last("val/loss"))


def test_a_diverged_seed_counts_as_infinite():
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [1.75, 2.5, 3.25]
    low, middle, high = quartiles(np.array([1.0, np.nan, 3.0, np.inf, 2.0]))
    assert (low, middle, high) == (2.0, 3.0, np.inf)


def test_several_trainings_in_one_directory_are_told(tmp_path):
    for _ in range(2):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(3):
                writer.add_scalar("val/loss", 1.0, step)
    with pytest.warns(UserWarning, match="holds several trainings"):
        compare_runs(tmp_path)


def test_a_strange_hparams_file_tells_no_seed(tmp_path):
    for name, text in (("a", ""), ("b", "- 1"), ("c", "!!python/object/apply:os.getcwd []"), ("d", "seed: 3")):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("val/loss", 1.0, 0)
        (tmp_path / name / "hparams.yaml").write_text(text)
    assert [read_run(tmp_path / name, tmp_path).seed for name in "abcd"] == [None, None, None, 3]


@pytest.mark.parametrize(
    ("metric", "is_higher"),
    [("val/acc", True), ("test/accuracy", True), ("acc_top5", True), ("val/loss", False), ("accumulated", False)],
)
def test_metrics_are_known_by_their_names(metric, is_higher):
    assert is_higher_better(metric) == is_higher


def test_hyperparameters_are_read_back(finished, tmp_path, write_run):
    run = read_run(finished / "custom_seed-2", finished)
    assert run.hparam("norm") == "custom" and run.hparam("weight_std") == 0.3 and run.hparams["depth"] == 2
    write_run(tmp_path, {"norm": "none", "norm_options": {"momentum": 0.9}}, val__loss={0: 1.0})
    nested = read_run(tmp_path, tmp_path)
    assert nested.hparam("norm_options.momentum") == 0.9
    with pytest.raises(ValueError, match=r"'depth' is no hyperparameter .*: choose one of norm, norm_options.momentum"):
        nested.hparam("depth")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (-0.0009999976, "-0.001"),
        (0.0, "0"),
        (1.2157849, "1.2157849"),
        (1e-12, "1.e-12"),
        (math.nan, "nan"),
    ],
)
def test_digits_are_those_numpy_prints(value, text):
    assert digits(value) == text


def test_a_comparison_is_no_run(tmp_path, write_run):
    for name in ("a", "comparison"):
        write_run(tmp_path / name, val__loss={0: 1.0})
    # Where earlier versions wrote theirs.
    with SummaryWriter(str(tmp_path), filename_suffix=".comparison") as writer:
        writer.add_image("comparison", np.zeros((3, 2, 2)))
    compare_runs(tmp_path)
    # Somebody's run of this name is one all the same.
    assert [path.name for path in find_runs(tmp_path)] == ["a", "comparison"]
    write_run(tmp_path / "b" / "deeper", val__loss={0: 1.0})
    compare_runs(tmp_path / "b")
    assert [path.name for path in find_runs(tmp_path)] == ["a", "deeper", "comparison"]


def test_hyperparameters_tell_where_a_value_ends(tmp_path, write_run, read_variants):
    name = "custom_activation-leaky_relu_batch_size-10"
    write_run(tmp_path / name, {"activation": "leaky_relu"}, val__loss={0: 1.0})
    write_run(tmp_path / "none_momentum-0.9", {"norm_options": {"momentum": 0.9}}, val__loss={0: 1.0})
    assert labels(read_variants(tmp_path)) == {
        name: "batch norm (ours), activation leaky_relu, batch size 10",
        "none_momentum-0.9": "no norm, momentum 0.9",
    }


def test_names_that_read_the_same_stay_names(tmp_path, write_run, read_variants):
    for name in ("none", "no norm"):
        write_run(tmp_path / name, val__loss={0: 1.0})
    assert labels(read_variants(tmp_path)) == {"none": "none", "no norm": "no norm"}


def test_curves_have_the_steps_of_all_runs(tmp_path, write_run, read_variants):
    write_run(tmp_path / "a_seed-1", val__loss={0: 3.0, 10: 2.0, 20: math.nan})
    write_run(tmp_path / "a_seed-2", val__loss={0: 5.0, 20: 1.0, 30: 0.0})
    write_run(tmp_path / "a_seed-3", train__loss={0: 1.0})
    (runs,) = read_variants(tmp_path).values()
    steps, table = curves(runs, "val/loss")
    assert steps.tolist() == [0, 20] and table.tolist() == [[3.0, math.inf], [5.0, 1.0]]
    assert curves(runs, "val/acc")[0].tolist() == [] and worst("val/acc") == -math.inf


def test_a_run_that_was_stopped_early_has_the_same_publication(tmp_path, write_run, read_variants):
    write_run(tmp_path / "a", published__val__acc={10: 0.5, 20: 0.75}, val__acc={0: 0.1})
    write_run(tmp_path / "b", published__val__acc={10: 0.5}, val__acc={0: 0.1})
    write_run(tmp_path / "c", val__acc={0: 0.1})
    variants = read_variants(tmp_path)
    assert published_curves(variants, "val/acc") == {name: {10: 0.5, 20: 0.75} for name in "abc"}
    assert published_curves(variants, "val/loss") == {}


def test_what_tests_measured_is_read_by_metric_and_variant(tmp_path, write_run, read_variants):
    for seed, value in enumerate([0.5, 0.25]):
        write_run(tmp_path / f"a_seed-{seed}", test__acc={20: value}, published__acc={20: 0.75}, val__acc={0: 0.1})
    write_run(tmp_path / "b", test__other={20: 1.0})
    measured = measured_in_tests(read_variants(tmp_path))
    assert {
        metric: {name: values.tolist() for name, values in found.items()} for metric, found in measured.items()
    } == {
        "acc": {"published": [0.75], "a": [0.5, 0.25]},
        "other": {"b": [1.0]},
    }
