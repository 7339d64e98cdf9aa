import runpy
import shutil

import pytest

from bnlightning import CONF_DIR, _conf


def test_configuration_is_found():
    assert (CONF_DIR / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["bnlightning/conf/train.yaml"], "bnlightning/conf"),
        (["conf/train.yaml", "pyproject.toml"], "conf"),
        # An editable install may leave a stale copy inside the package.
        (["conf/train.yaml", "pyproject.toml", "bnlightning/conf/train.yaml"], "conf"),
        # Somebody else's conf beside the installed package.
        (["conf/train.yaml", "bnlightning/conf/train.yaml"], "bnlightning/conf"),
    ],
    ids=["installed", "checkout", "editable", "beside another conf"],
)
def test_it_is_the_packages_own(files, expected, tmp_path):
    for file in ("bnlightning/_conf.py", *files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    module = shutil.copy(_conf.__file__, tmp_path / "bnlightning")
    assert runpy.run_path(str(module))["CONF_DIR"] == tmp_path / expected
