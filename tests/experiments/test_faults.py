import errno
import os
import re
import shlex
import threading
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import ConfigKeyError

from bnlightning.experiments import faults


def chain(error, *causes):
    for effect, cause in zip((error, *causes), causes, strict=False):
        effect.__cause__ = cause
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_as_such_whatever_met_it(number):
    error = chain(RuntimeError("a callback's"), ValueError("a logger's"), OSError(number, "No room"))
    told = faults.explained(error, "out/custom")
    assert isinstance(told, faults.REFUSALS)
    assert str(told) == "out/custom cannot be written (No room): make room there, or give another output_dir=PATH."


def test_what_has_no_sentence_of_its_own_stays_what_it_is():
    for error in (OSError(errno.ENOENT, "No such file"), RuntimeError("mine"), ValueError("mine")):
        assert faults.explained(error, "out") is error


def test_one_message_is_the_users_own_mistake_and_not_hydras_wrapping(monkeypatch, capsys):
    wrapped = chain(InstantiationException("Error in call to target"), ValueError("depth=0 is not possible"))
    assert faults.message(wrapped) == "depth=0 is not possible"
    assert faults.message(chain(InstantiationException("Error locating"), ImportError("no module"))) == "Error locating"
    missing = chain(ValueError("Could not override"), ConfigKeyError("Key is not in struct"))
    assert faults.message(missing) == "Could not override\nKey is not in struct"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert faults.message(wrapped) == "depth=0 is not possible"
    assert "InstantiationException: Error in call to target" in capsys.readouterr().err


def test_without_a_gpu_the_message_names_the_cure():
    error = chain(InstantiationException("Error"), MisconfigurationException("No supported gpu backend found!"))
    told = faults.message(faults.explained(error, "out"))
    assert told.startswith("trainer.accelerator='gpu' is not possible: no GPU is found. Give trainer=cpu")


@pytest.mark.parametrize("text", ["Connection closed by peer [127.0.0.1]", "the remote process has gone"])
def test_a_lost_rank_is_told_in_words(text):
    assert faults.reason(RuntimeError(text)) == faults.LOST
    assert faults.reason(RuntimeError("mine")) == "RuntimeError: mine"


def test_a_workers_failure_names_the_run_and_says_how_to_see_more():
    assert faults.in_a_worker("custom", ValueError("batch_size=1")) == "custom: batch_size=1"
    told = faults.in_a_worker("custom", RuntimeError("mine"))
    assert told == "custom: RuntimeError: mine (n_jobs=1 shows the traceback.)"


def test_the_last_words_can_be_typed():
    lines = faults.stopped(Path("my runs")).splitlines()
    assert shlex.split(lines[0])[-1] == "my runs" and shlex.split(lines[1])[-1] == "output_dir=my runs"


def test_at_most_three_changes_are_told():
    told = faults.resumes_another_configuration(Path("out"), [f"a{i}=1, not 2" for i in range(5)])
    assert "a2=1, not 2 and 2 more." in told and "a3" not in told


def test_a_full_disk_in_a_thread_is_left_to_the_main_thread(capsys):
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("mine")):
        faults.thread_excepthook(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))
    output = capsys.readouterr().err
    assert "RuntimeError: mine" in output and "full" not in output


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
            r"^experiment=tnah is not known\. Did you mean tanh\?",
        ),
        (["model.norm=batch"], r"^model\.norm='batch' is not known: choose one of none, custom, torch\.$"),
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
        (["model.dpeth=3"], r"^model\.dpeth is not known\. Did you mean model\.depth\?"),
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
