import csv
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import read_events, scalar

from .commands import SHORT, read_hparams, run_directory


@pytest.mark.slow
def test_variants_share_data_batches_and_weights_and_a_seed_repeats_its_numbers(run_module, tmp_path):
    for name in ("first", "second"):
        result = run_module("bnlightning.train", "+experiment=tanh", f"output_dir={name}", "seed=4", *SHORT)
        assert result.returncode == 0, result.stderr
    for variant in ("none", "custom"):
        first, second = (read_events(tmp_path / name / variant) for name in ("first", "second"))
        tags = first.Tags()["scalars"]
        assert tags == second.Tags()["scalars"] and "health/val_saturated" in tags
        assert all(scalar(first, tag) == scalar(second, tag) for tag in tags)
        for tag in first.Tags()["histograms"]:
            a, b = ([h.histogram_value for h in events.Histograms(tag)] for events in (first, second))
            assert a == b
    # The input is the same in both variants: raw in the one, in the other less its mean and over its deviation.
    raw, normal = (
        read_events(tmp_path / "first" / v).Histograms("layer_hist/net.input_norm")[0] for v in ("none", "custom")
    )
    raw, normal = raw.histogram_value, normal.histogram_value
    mean, std = raw.sum / 10, np.sqrt(raw.sum_squares / 10 - (raw.sum / 10) ** 2)
    assert normal.max == pytest.approx((raw.max - mean) / std, rel=1e-3)


@pytest.mark.slow
def test_relu_without_normalisation_diverges_and_is_not_called_dead(run_module, tmp_path):
    result = run_module("bnlightning.train", "+experiment=relu", "trainer.max_steps=50")
    assert result.returncode == 0, result.stderr
    directory = run_directory(tmp_path, "relu")
    events = read_events(directory / "none")
    losses = scalar(events, "train/loss")
    assert np.isfinite(losses[0]) and not any(np.isfinite(loss) for step, loss in losses.items() if step >= 1)
    (found,) = events.Tensors("health/first_nonfinite_layer/text_summary")
    layer = found.tensor_proto.string_val[0].decode()
    assert found.step == 1 and re.fullmatch(r"net\.(linear[1-7]|output)", layer)
    for index in range(1, 8):
        assert scalar(events, f"layer_val_nonfinite/net.act{index}")[50] == 1.0
        assert scalar(events, f"layer_val_dead/net.act{index}")[50] == 0.0
    with (directory / "comparison.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows["no norm"]["final cost"] == "not finite" and rows["no norm"]["first non-finite"] == f"step 1, {layer}"
    assert rows["no norm"]["dead"] == "0.0 %" and rows["no norm"]["non-finite"] == "100.0 %"
    assert rows["batch norm (ours)"]["first non-finite"] == "none seen"
    assert (
        "Diverged is not dead" in result.stdout and "Diverged is not dead" in (directory / "comparison.md").read_text()
    )


@pytest.mark.slow
def test_moving_averages_after_one_step_are_the_published_ones(run_module, tmp_path):
    with (Path(__file__).parents[1] / "reference" / "moving_average.csv").open() as file:
        published = {row["metric"]: row["published"] for row in csv.DictReader(file)}
    result = run_module("bnlightning.train", "+experiment=moving_average")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    directory = run_directory(tmp_path, "moving_average")
    keras, pytorch = (read_events(directory / f"custom_convention-{name}") for name in ("keras", "pytorch"))
    for metric, text in published.items():
        for prefix in ("test", "published"):
            (value,) = scalar(keras, f"{prefix}/{metric}").values()
            assert np.array2string(np.float32([value]))[1:-1].removesuffix(".") == text, metric
    assert scalar(keras, "test/running_var") == {1: np.float32(0.74709475)}
    assert scalar(keras, "test/norm_output_x0") == {1: np.float32(-0.40697935)}
    assert scalar(keras, "test/norm_output_x1") == {1: np.float32(1.215785)}
    assert f"{scalar(pytorch, 'test/running_var')[1]:.7g}" == "0.9941896"
    again = run_module("bnlightning.compare", str(directory))
    for output in (result.stdout, again.stdout):
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
        printed = {row[0]: row[1:] for row in rows if len(row) == 4 and row[0] in published}
        assert {metric: row[:2] for metric, row in printed.items()} == {m: [text] * 2 for m, text in published.items()}
        assert printed["running_var"][2] == "≠ 0.99418956" and printed["running_mean"][2] == "0.3514931"
        assert "running variance 0.7470948 = 0.5 * 1 before the step + 0.5 * 0.4941896" in output
        assert "running variance 0.9941896 = 0.5 * 1 before the step + 0.5 * 0.9883791" in output


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["torch", "none"])
def test_moving_averages_of_other_layers(norm, run_module, tmp_path):
    result = run_module("bnlightning.train", "+experiment=moving_average", f"model.norm={norm}", "seed=3")
    assert result.returncode == 0, result.stderr
    for convention in ("keras", "pytorch"):
        events = read_events(run_directory(tmp_path, "moving_average") / f"{norm}_convention-{convention}")
        if norm == "torch":
            assert f"{scalar(events, 'test/running_var')[1]:.7g}" == "0.9941896"
        else:
            assert "test/running_var" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_a_checkpoint_can_be_resumed_to_the_same_numbers(run_module, tmp_path):
    short = ("model.norm=custom", "data.num_points=200", "trainer.max_steps=-1")
    whole = run_module("bnlightning.train", *short, "trainer.max_epochs=2", "output_dir=whole")
    part = run_module("bnlightning.train", *short, "trainer.max_epochs=1", "output_dir=part")
    assert whole.returncode == part.returncode == 0, whole.stderr + part.stderr
    checkpoint = "ckpt_path=part/custom/checkpoints/last.ckpt"
    rest = run_module("bnlightning.train", *short, "trainer.max_epochs=2", "output_dir=rest", checkpoint)
    assert rest.returncode == 0, rest.stderr
    for tag in ("train/loss", "val/loss"):
        first, last = (scalar(read_events(tmp_path / name / "custom"), tag) for name in ("whole", "rest"))
        assert last and last == {step: value for step, value in first.items() if step >= min(last)}
    for arguments, message in (
        (("model.width=7",), r"^ckpt_path='.*' does not fit the model with norm='custom': .*\(.*size mismatch"),
        (("trainer.max_steps=20",), r"^ckpt_path='.*' is at step 20 already: give trainer.max_steps above it, not 20"),
        (
            ("trainer.max_epochs=1",),
            r"^ckpt_path='.*' is of 1 epoch\(s\) already: give trainer.max_epochs above it, not 1",
        ),
    ):
        result = run_module("bnlightning.train", *short, "output_dir=never", checkpoint, *arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert re.search(message, result.stderr, re.DOTALL), result.stderr
        assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_the_number_of_threads_is_each_runs_own(run_module, tmp_path):
    options = ("model.norm=none", "trainer.max_steps=2", "callbacks=bare", "output_dir=out")
    result = run_module("bnlightning.train", "num_threads=2,null", *options, OMP_NUM_THREADS="1")
    assert result.stdout.splitlines()[:2] == [
        "Training no norm, num threads 2 on 2 threads",
        "Training no norm, num threads None on 1 thread",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_tensorboard_lists_what_a_sweep_gave_its_runs_and_how_they_ended(n_jobs, run_module, tmp_path):
    # Without normalisation relu diverges.
    options = ("+experiment=relu", "model.learning_rate=0.001,0.002", "trainer.max_steps=8", "callbacks=bare")
    result = run_module("bnlightning.train", *options, f"n_jobs={n_jobs}", "output_dir=out")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    listed = read_hparams(tmp_path / "out")
    assert len(listed) == 4
    for name, (values, results) in listed.items():
        norm, _, rate = name.partition("_learning_rate-")
        assert values == {"model.norm": norm, "model.learning_rate": float(rate), "model.activation": "relu"}
        (last,) = [
            value for step, value in scalar(read_events(tmp_path / "out" / name), "val/loss").items() if step == 8
        ]
        assert results == {"val/loss": pytest.approx(last, nan_ok=True)}
        assert np.isfinite(last) == (norm == "custom")
