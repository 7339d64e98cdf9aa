import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, scalar
from torch import nn

from bnlightning import ActivationMonitor, LitMovingAverage, PointsDataModule, PredictionMonitor

OPTIONS = {"eps": 1e-3, "momentum": 0.5, "convention": "keras", "backend": "reference"}
TORCH = {**OPTIONS, "convention": "pytorch"}
with (Path(__file__).parents[1] / "reference" / "moving_average.csv").open() as file:
    REFERENCE = list(csv.DictReader(file))


def two_points():
    return PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])


def measured(directory=None, *, steps=1, norm="custom", norm_options=OPTIONS, **options):
    """What the test gives after the training, and the trained model."""
    model = LitMovingAverage(norm=norm, norm_options=norm_options)
    trainer = quiet_trainer(directory, max_steps=steps, limit_val_batches=0, **options)
    data = two_points()
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    return metrics, model


def test_one_step_prints_what_was_published_digit_for_digit():
    metrics, _ = measured()
    assert list(metrics) == [f"test/{row['metric']}" for row in REFERENCE]
    # As numpy prints the arrays that TensorFlow returns: at most eight digits behind the point.
    printed = [str(np.array([value], dtype=np.float32)) for value in metrics.values()]
    assert printed == [str(np.array([row["published"]], dtype=np.float32)) for row in REFERENCE]
    assert {row["published"] for row in REFERENCE} == {text[1:-1].removesuffix(".") for text in printed}


def test_the_published_weight_before_the_step_does_not_lead_to_the_published_numbers_after_it():
    model, data = LitMovingAverage(norm_options=OPTIONS, hidden_weight=1.405974), two_points()
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert str(np.float32(metrics["test/running_mean"])) == "0.3514935"
    assert metrics["test/hidden_weight"] == pytest.approx(1.405974 - 0.00099842, abs=2e-7)


def test_one_step_in_float64():
    model, data = LitMovingAverage(norm_options=OPTIONS).double(), two_points()
    quiet_trainer(max_steps=1, limit_val_batches=0, precision="64-true").fit(model, data)
    model.eval()
    norm, x = model.net.norm1, data.x.double()
    hidden = model.net.linear1(x)
    output = norm(hidden)
    values = [model.net.linear1.weight, *hidden, *output, *output.relu(), norm.running_mean, norm.running_var]
    expected = [float(row["float64"]) for row in REFERENCE if row["float64"]]
    assert [value.item() for value in values] == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(("norm", "options"), [("torch", OPTIONS), ("torch", TORCH), ("custom", TORCH)])
def test_torchs_estimator_changes_the_running_variance_and_what_follows_from_it_only(norm, options):
    keras, _ = measured()
    metrics, _ = measured(norm=norm, norm_options=options)
    hidden = torch.tensor([0.0, 1.4059723615646362], dtype=torch.float64)
    assert metrics["test/running_var"] == pytest.approx(0.5 + 0.5 * hidden.var(correction=1).item(), rel=1e-6)
    assert f"{metrics['test/running_var']:.7g}" == "0.9941896"
    different = {name for name in keras if metrics[name] != pytest.approx(keras[name], rel=1e-5)}
    assert different == {"test/running_var", "test/norm_output_x0", "test/norm_output_x1", "test/act_output_x1"}
    for x in (0, 1):
        normal = (metrics[f"test/hidden_output_x{x}"] - metrics["test/running_mean"]) / math.sqrt(
            metrics["test/running_var"] + 1e-3
        )
        expected = metrics["test/scale"] * normal + metrics["test/shift"]
        assert metrics[f"test/norm_output_x{x}"] == pytest.approx(expected, rel=1e-6)


def test_torchs_layer_gives_what_ours_gives_in_its_convention():
    theirs, _ = measured(norm="torch")
    ours, _ = measured(norm_options=TORCH)
    assert theirs == pytest.approx(ours, rel=5e-6)


@pytest.mark.parametrize(
    ("norm", "options", "steps", "words"),
    [
        ("custom", OPTIONS, 1, ["0.7470948 = 0.5 * 1 before the step + 0.5 * 0.4941896, the batch's biased variance"]),
        ("custom", TORCH, 1, ["0.9941896 = 0.5 * 1 before the step + 0.5 * 0.9883791, the batch's unbiased variance"]),
        ("torch", OPTIONS, 1, ["0.9883791, the batch's unbiased variance", "'keras' is ignored"]),
        ("custom", {**OPTIONS, "convention": "caffe"}, 1, ["0.9883791 = 0 * 0 before the step + 1 * 0.9883791"]),
        ("custom", {**OPTIONS, "convention": "caffe"}, 3, ["= 0.4285714 * 0.987", "+ 0.5714286 * 0.98"]),
        ("custom", {**OPTIONS, "momentum": None}, 2, ["= 0.5 * 0.4941896 before the step + 0.5 * 0.493"]),
    ],
)
def test_the_note_says_how_the_running_variance_came_about(norm, options, steps, words, tmp_path):
    metrics, _ = measured(tmp_path, norm=norm, norm_options=options, steps=steps)
    events = read_events(tmp_path)
    (text,) = events.Tensors("test/note/text_summary")
    note = text.tensor_proto.string_val[0].decode()
    assert note.startswith(f"running variance {metrics['test/running_var']:.7g} = ") and all(w in note for w in words)
    new, decay, old, momentum, var = (float(number) for number in re.findall(r"\d+(?:\.\d+)?", note)[:5])
    assert new == pytest.approx(decay * old + momentum * var, rel=1e-6)
    assert text.step == steps
    assert {tag: [*scalar(events, tag)] for tag in metrics} == {tag: [steps] for tag in metrics}


def test_without_normalisation_there_is_nothing_to_average(tmp_path):
    metrics, model = measured(tmp_path, norm="none")
    assert isinstance(model.net.norm1, nn.Identity)
    assert [name for name in metrics if "running" in name or "scale" in name] == []
    assert metrics["test/norm_output_x1"] == metrics["test/hidden_output_x1"] == metrics["test/hidden_weight"]
    assert "test/note/text_summary" not in read_events(tmp_path).Tags()["tensors"]


def test_monitors_change_nothing_and_see_each_value_once(tmp_path):
    alone, _ = measured()
    watched, _ = measured(tmp_path, callbacks=[ActivationMonitor(1, modules="net.*"), PredictionMonitor()])
    assert watched == alone
    events = read_events(tmp_path)
    for tag in ("layer_hist/net.linear1", "layer_test_hist/net.act1"):
        (histogram,) = events.Histograms(tag)
        assert histogram.histogram_value.num == 2


def test_a_checkpoint_rebuilds_the_same_layers_and_resumes(tmp_path):
    whole, _ = measured(steps=3)
    model, data = LitMovingAverage(norm_options=OPTIONS), two_points()
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LitMovingAverage.load_from_checkpoint(tmp_path / "model.ckpt")
    assert repr(loaded) == repr(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(loaded, data, ckpt_path=tmp_path / "model.ckpt")
    (metrics,) = trainer.test(loaded, data, verbose=False)
    assert metrics == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is not known"),
        ({"norm_options": {"convention": "kears"}}, "convention='kears' is not known"),
        ({"hidden_weight": math.inf}, "hidden_weight=inf is not possible"),
        ({"output_weight": "a"}, "output_weight='a' is not possible"),
        ({"learning_rate": 0}, "learning_rate=0 is not possible: give a number above 0"),
        ({"adam_eps": -1.0}, "adam_eps=-1.0 is not possible: give a number of at least 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LitMovingAverage(**options)


def test_a_batch_of_one_is_refused_before_training():
    data = PointsDataModule(x=[[0.0], [1.0], [2.0]], y=[[3.0], [4.0], [5.0]], batch_size=2)
    with pytest.raises(ValueError, match="batch_size=2 is not possible with norm='custom': it leaves"):
        quiet_trainer(max_steps=1).fit(LitMovingAverage(), data)
