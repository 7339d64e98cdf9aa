import pytest

from bnlightning.compare.names import KINDS
from bnlightning.monitors.record import Entry, Record


def test_entries_by_kind():
    layer, norm, parameter = (Entry({"x": value}) for value in (1.0, 2.0, 3.0))
    record = Record(0, layers={"a": layer}, norms={"b": norm}, parameters={"c": parameter})
    assert {kind: dict(record.entries(kind)) for kind in KINDS} == {
        "layer": {"a": layer},
        "norm": {"b": norm},
        "param": {"c": parameter},
    }
    with pytest.raises(KeyError):
        record.entries("other")
