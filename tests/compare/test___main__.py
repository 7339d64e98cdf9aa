import functools
import re

import matplotlib.image
import numpy as np
import pytest
import yaml

from bnlightning import compare_runs
from bnlightning.compare.__main__ import main
from bnlightning.compare.figures import draw_parameter


def sweep_configuration(parameter, target="bnlightning.compare.figures.draw_parameter"):
    draw = {"_target_": target, "_partial_": True, "parameter": parameter}
    compare = {"_target_": "bnlightning.experiments.CompareRuns", "metric": "train/loss", "draw": draw}
    return yaml.safe_dump({"hydra": {"callbacks": {"other": None, "mine": compare}}})


def test_the_command_line_compares_as_the_sweep_does(tmp_path, capsys, write_run):
    for rate in (0.1, 1.0):
        write_run(tmp_path / str(rate), {"norm": "none", "rate": rate}, train__loss={0: 1.0, 5: rate})
    expected = compare_runs(tmp_path, "train/loss", functools.partial(draw_parameter, parameter="rate"))
    pixels = matplotlib.image.imread(expected.figure)
    compare_runs(tmp_path, "train/loss")
    assert matplotlib.image.imread(expected.figure).shape != pixels.shape
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rate"))
    main([str(tmp_path)])
    np.testing.assert_array_equal(matplotlib.image.imread(expected.figure), pixels)
    # What the figure cannot show is shown by the default one.
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rates"))
    main([str(tmp_path)])
    assert matplotlib.image.imread(expected.figure).shape != pixels.shape
    assert "so this is the default one: 'rates' is no hyperparameter" in capsys.readouterr().err
    (tmp_path / "multirun.yaml").write_text(sweep_configuration("rate", "nobody.knows"))
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert re.search(r"draw='nobody.knows' in .*multirun.yaml cannot be imported", capsys.readouterr().err)


def test_the_command_line(finished, capsys, tmp_path):
    main([str(finished)])
    output = capsys.readouterr().out
    assert f"Figure: {finished / 'comparison.png'}" in output and f"tensorboard --logdir {finished}" in output
    with pytest.raises(SystemExit) as failure:
        main([str(tmp_path)])
    assert failure.value.code == 1
    assert "holds no TensorBoard files of a run" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_behind_the_table(tmp_path, capsys, write_run):
    write_run(tmp_path / "custom", val__loss={0: 1.0})
    (tmp_path / "comparison.png").mkdir()
    with pytest.raises(SystemExit) as failure:
        main([str(tmp_path)])
    output, errors = capsys.readouterr()
    assert failure.value.code == 1
    assert "batch norm (ours)" in output and "Figure" not in output
    assert errors.count("\n") == 1 and errors.startswith("The comparison is not written: ") and "Errno" not in errors
