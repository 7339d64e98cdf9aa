import functools

import pytest
import yaml

from bnlightning.compare.figures import draw_parameter
from bnlightning.compare.sweep import compare_sweep, declared_by_sweep


def write_configuration(directory, draw, target="bnlightning.experiments.CompareRuns"):
    compare = {"_target_": target, "metric": "train/loss", "draw": draw}
    configuration = {"hydra": {"callbacks": {"other": None, "mine": compare}}}
    (directory / "multirun.yaml").write_text(yaml.safe_dump(configuration))


@pytest.mark.parametrize(
    "target", ["bnlightning.experiments.CompareRuns", "bnlightning.experiments.command.CompareRuns"]
)
def test_a_sweep_declares_its_metric_and_its_figure(target, tmp_path):
    declared = {"_target_": "bnlightning.compare.figures.draw_parameter", "_partial_": True, "parameter": "rate"}
    write_configuration(tmp_path, declared, target)
    metric, draw = declared_by_sweep(tmp_path)
    assert metric == "train/loss" and isinstance(draw, functools.partial)
    assert draw.func is draw_parameter and draw.keywords == {"parameter": "rate"}
    write_configuration(tmp_path, None, target)
    assert declared_by_sweep(tmp_path) == ("train/loss", None)


@pytest.mark.parametrize("path", ["nobody.knows", "bnlightning.compare.figures.draw_nothing", "nothing"])
def test_a_figure_that_is_not_here_is_named(path, tmp_path):
    write_configuration(tmp_path, {"_target_": path, "_partial_": True})
    with pytest.raises(ValueError, match=rf"draw='{path}' in .*multirun.yaml cannot be imported"):
        declared_by_sweep(tmp_path)


def test_the_default_figure_takes_the_place_of_one_that_refuses(tmp_path, write_run, capsys):
    def refuse(variants, metric, title, notes):
        raise ValueError("no")

    write_run(tmp_path / "a", val__loss={0: 1.0})
    assert compare_sweep(tmp_path, "val/loss", refuse).figure.stat().st_size > 10_000
    assert capsys.readouterr().err == "The sweep's own figure cannot be drawn, so this is the default one: no\n"
    with pytest.raises(ValueError, match="metric='val/acc' was logged by no run"):
        compare_sweep(tmp_path, "val/acc", None)


@pytest.mark.parametrize("text", ["", "- 1", "hydra: 1", "hydra: {callbacks: null}", "!!python/name:os.getcwd", "a: ["])
def test_a_strange_sweep_configuration_declares_nothing(text, tmp_path):
    (tmp_path / "multirun.yaml").write_text(text)
    assert declared_by_sweep(tmp_path) == ("val/loss", None)
