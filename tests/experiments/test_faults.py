import os
import re

import pytest
import torch


@pytest.mark.slow
def test_a_parallel_run_that_fails_is_named_in_one_message(run_module, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bnlightning import LitRegressor\n\n\n"
        "class Failing(LitRegressor):\n"
        "    def on_train_start(self):\n"
        "        if self.hparams['depth'] == 2:\n"
        "            raise RuntimeError('no more of this')\n"
    )
    result = run_module(
        "bnlightning.train", "model._target_=mine.Failing", "model.depth=2,3", "n_jobs=2", "trainer.max_steps=5",
        "output_dir=out", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("custom_depth-2: RuntimeError: no more of this")
    assert "Traceback" not in result.stderr and "custom_depth-3" not in result.stderr
    # The other had begun, and is finished.
    assert [path.parent.name for path in tmp_path.glob("out/*/finished")] == ["custom_depth-3"]
    result = run_module("bnlightning.train", "seed=1,2", "n_jobs=2", "trainer.devices=2", "output_dir=devices")
    assert result.returncode == 1
    assert re.search(
        r"^custom_seed-\d: n_jobs above 1 is not possible with 2 devices .*n_jobs=1\.\n$", result.stderr, re.MULTILINE
    )
    assert not (tmp_path / "devices").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["+experiment=tnah"],
            r"Could not find 'experiment/tnah'\n\nAvailable options in 'experiment':\n(\t\w+\n)*\trelu\n",
        ),
        (["model.norm=batch"], r"^norm='batch' is not known: choose one of none, custom, torch\.$"),
        (["model.activation=tan"], r"^activation='tan' is not known: choose one of elu, .*tanh\.$"),
        (["model.depth=0"], r"^depth=0 is not possible: give an integer of at least 1\.$"),
        (["model.width=-3"], r"^width=-3 is not possible: give an integer of at least 1\.$"),
        (["data.batch_size=1"], r"^batch_size=1 is not possible with norm='custom'.*Choose another data\.batch_size"),
        (["data.num_points=2501"], r"^batch_size=10 is not possible with norm='custom': it leaves a batch of one"),
        (["num_threads=0"], r"^num_threads=0 is not possible"),
        (["n_jobs=0"], r"^n_jobs=0 is not possible: give an integer of at least 1\.$"),
        (["seed=-1"], r"^seed=-1 is not possible: give an integer from 0 to 4294967295"),
        (["ckpt_path=missing.ckpt"], r"^ckpt_path='missing.ckpt' is not a file"),
        (["ckpt_path=a_file"], r"^ckpt_path='a_file' is no checkpoint of Lightning's, or a damaged one \("),
        (["resume=flase"], r"^resume='flase' is not possible: give true or false\.$"),
        (["seed=1,2,1"], r"^seed=1,2,1 would train the same run twice: give each value once\.$"),
        (["trainer.max_epochs=1.5"], r"^trainer\.max_epochs=1\.5 is not possible: give an integer of at least -1\.$"),
        (["trainer.max_steps=many"], r"^trainer\.max_steps='many' is not possible: give an integer of at least -1\.$"),
        (["trainer.devices=none"], r"devices"),
        pytest.param(
            ["trainer=gpu"],
            r"^trainer\.accelerator='gpu' is not possible: no GPU is found\. Give trainer=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["hydra.mode=RUN"], r"^hydra\.mode=RUN is not possible"),
        (
            ["output_dir=a_file/below"],
            r"^output_dir='.*a_file/below' cannot be written \(Not a directory\): give another",
        ),
        (["model.dpeth=3"], r"Could not override 'model\.dpeth'"),
    ],
)
def test_bad_input_gives_one_message_and_leaves_nothing(arguments, message, run_module, tmp_path):
    (tmp_path / "a_file").touch()
    result = run_module("bnlightning.train", *([] if "+" in arguments[0] else ["+experiment=tanh"]), *arguments)
    assert result.returncode == 1
    output = (result.stdout + result.stderr).strip()
    assert re.search(message, output, re.MULTILINE), output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]
