import posixpath
import re

import pytest

from bnlightning.writing.plain_names import plain_name

# Calls, outputs and paths of every kind, names that a wrong rule would make alike, and what MLflow refuses.
TAGS = [
    "layer_mean/net.act",
    "layer_mean/net.act#1",
    "layer_mean/net.act1",
    "layer_mean/net.act:1",
    "layer_mean/net.act call 1",
    "layer_mean/net.act call  1",
    "layer_mean/net.act#1:logits",
    "layer_mean/net.act/1",
    "layer_mean/net.act slash 1",
    "layer_mean/ä",
    "layer_mean/ö",
    "layer_mean/ue4",
    "layer_mean/ ue4 ",
    "layer_mean//",
    "layer_mean/",
    "layer_mean",
    "layer_mean/.",
    "layer_mean/..",
    "layer_mean/a//b",
    "layer_mean/a/b",
    "layer_mean/a/../b",
    "/absolute",
    "absolute",
    "layer_mean/" + "a" * 300,
    "layer_mean/" + "a" * 300 + "#1",
]


@pytest.mark.parametrize("tag", TAGS)
def test_every_name_is_one_that_mlflow_and_its_logger_accept(tag):
    name = plain_name(tag)
    # What Lightning's logger drops, and MLflow's own rules.
    assert re.sub("[^a-zA-Z0-9_/. -]+", "", name) == name
    assert posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    assert name != "." and len(name) <= 250


def test_no_two_names_are_alike_and_none_goes_through_another():
    names = [plain_name(tag) for tag in TAGS]
    assert len(set(names)) == len(TAGS)
    files = [name for name in names if "/" in name]
    assert all(name.count("/") == 1 for name in files)


def test_a_plain_tag_keeps_its_name():
    for tag in ("health/dead", "layer_val_dead/net.1.act_2", "param_grad_norm/a-b.weight"):
        assert plain_name(tag) == tag
