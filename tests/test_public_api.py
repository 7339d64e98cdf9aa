import types

import bnlightning


def test_all_is_sorted_and_complete():
    names = bnlightning.__all__
    public = {
        name
        for name, value in vars(bnlightning).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(names) == public
    # Constants, then classes, then functions, as ruff sorts them.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_everything_public_is_documented():
    for name in bnlightning.__all__:
        assert name == "CONF_DIR" or getattr(bnlightning, name).__doc__, name


def test_version():
    assert bnlightning.__version__.count(".") == 2
