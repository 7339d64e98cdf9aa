import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from bnlightning import CONF_DIR
from bnlightning.experiments import faults
from bnlightning.experiments.checks import check_runs


def check(*overrides):
    """Check a command with these overrides as it does itself, less Hydra's own part."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        sweep = GlobalHydra.instance().hydra
        check_runs(sweep.compose_config("train", [*overrides], run_mode=RunMode.MULTIRUN))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.activation=tan", r"^model\.activation='tan' is not known: choose one of elu, .*tanh\.$"),
        ("model.depth=0", r"^model\.depth=0 is not possible: give an integer of at least 1\.$"),
        ("model.width=-3", r"^model\.width=-3 is not possible: give an integer of at least 1\.$"),
        ("data.batch_size=1", r"^batch_size=1 is not possible with norm='custom'.*Choose another data\.batch_size"),
        ("data.num_points=2501", r"^batch_size=10 is not possible with norm='custom': it leaves a batch of one"),
        ("num_threads=0", r"^num_threads=0 is not possible"),
        ("n_jobs=0", r"^n_jobs=0 is not possible: give an integer of at least 1\.$"),
        ("seed=-1", r"^seed=-1 is not possible: give an integer from 0 to 4294967295"),
        ("ckpt_path=missing.ckpt", r"^ckpt_path='missing.ckpt' is not a file"),
        ("ckpt_path=a_file", r"^ckpt_path='a_file' is no checkpoint of Lightning's, or a damaged one \("),
        ("resume=flase", r"^resume='flase' is not possible: give true or false\.$"),
        ("seed=1,a", r"^seed='a' is not possible: give an integer from 0"),
        ("seed=range(0.5,2)", r"^seed=0\.5 is not possible: give an integer from 0"),
        (
            "model.norm_options.convention=kears",
            r"^model\.norm_options\.convention='kears' is not known: choose one of",
        ),
        ("trust_ckpt=perhaps", r"^trust_ckpt='perhaps' is not possible: give true or false\.$"),
        ("+callbacks.mine.every=3", r"^callbacks\.mine is no callback: name its class"),
        ("seed=1,2,1", r"^seed=1,2,1 would train the same run twice: give each value once\.$"),
        ("trainer.max_epochs=1.5", r"^trainer\.max_epochs=1\.5 is not possible: give an integer of at least -1\.$"),
        ("trainer.max_steps=many", r"^trainer\.max_steps='many' is not possible: give an integer of at least -1\.$"),
    ],
)
def test_what_is_not_possible_is_refused(override, message, tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(faults.REFUSALS) as refusal:
        check("+experiment=tanh", override)
    assert re.search(message, faults.message(refusal.value))


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "what it likes")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_checkpoint_runs_no_code_unless_it_is_trusted(options, tmp_path):
    written, path = tmp_path / "written", tmp_path / "theirs.ckpt"
    torch.save({"state_dict": {}, "global_step": 3, "more": WritesAFile(written)}, path, **options)
    with pytest.raises(
        ValueError, match=r"^ckpt_path='.*theirs\.ckpt' holds more than .* \(getattr\).*trust_ckpt=true"
    ):
        check(f"ckpt_path={path}")
    assert not written.exists()
    # Read then, and found to be of no such model.
    with pytest.raises(ValueError, match="does not fit the model"):
        check(f"ckpt_path={path}", "trust_ckpt=true")
    assert written.exists()


@pytest.mark.parametrize("trust", ["false", "true"])
@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"hello world\n", b'{"a": 1}', b"c\n"])
def test_a_file_of_another_kind_is_no_checkpoint(content, trust, tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        check(f"ckpt_path={path}", f"trust_ckpt={trust}")
    assert re.fullmatch(
        r"ckpt_path='.*figure\.png' is no checkpoint: give one, such as .* of a run\.", str(refusal.value)
    )


def test_what_is_possible_is_not():
    check("+experiment=tanh", "model.norm=none,custom", "seed=1,2", "model.depth=2")


def test_a_run_of_many_is_refused_whichever_it_is():
    with pytest.raises(ValueError) as refusal:
        check("model.norm=none,custom", "model.depth=2,0,3")
    assert faults.message(refusal.value).startswith("model.depth=0 is not possible")


@pytest.mark.slow
def test_one_refused_run_stops_the_sweep_before_the_first(run_module, tmp_path):
    result = run_module("bnlightning.train", "data.batch_size=10,1", "model.norm=none,custom", "output_dir=out")
    assert result.returncode == 1 and re.search(r"^batch_size=1 is not possible", result.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
