"""Limits that a user sets, and the sentences of the warnings about layers that exceed one."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bnlightning.compare.names import TEST, TRAIN, VAL
from bnlightning.monitors.record import Entry, Record
from bnlightning.monitors.statistic import Alarm, Statistic
from bnlightning.monitors.words import labelled, listed

_PHASES = {TRAIN: "training", VAL: "validation", TEST: "test"}
_MAX_LISTED = 5


@dataclass(frozen=True)
class Threshold:
    """One number of the layers, and its limit.

    Args:
        statistic: Name of the statistic.
        argument: Name of the argument that set the limit.
        limit: Value above which there is a warning.
        alarm: The words of the warning.
        kind: What has the number: ``"layer"``, ``"param"`` or ``"norm"``.
        is_relative: Whether the ratio to the last layer's number is meant, in either direction.
    """

    statistic: str
    argument: str
    limit: float
    alarm: Alarm
    kind: str = "layer"
    is_relative: bool = False


def make_thresholds(
    limits: Mapping[str, float | None], statistics: Iterable[Statistic[Any]], kind: str = "layer"
) -> list[Threshold]:
    """The thresholds for the limits that are set.

    Args:
        limits: The limit by name of the statistic. ``None``: there is none.
        statistics: The declarations, which hold the words of the warnings.
        kind: What has the numbers: ``"layer"``, ``"param"`` or ``"norm"``.
    """
    found = []
    for statistic in statistics:
        limit = limits.get(statistic.name)
        if statistic.alarm is not None and limit is not None:
            is_relative = statistic.look is not None and statistic.look.relative
            argument = f"warn_{statistic.name}{'_ratio' if is_relative else ''}_above"
            found.append(Threshold(statistic.name, argument, limit, statistic.alarm, kind, is_relative))
    return found


def ill_layers(threshold: Threshold, record: Record, needed: int = 0) -> dict[str, str]:
    """What is wrong with each layer above the threshold, by its path and class, the worst one first.

    Args:
        threshold: The number and its limit.
        record: The record of a sampled step or of an evaluation.
        needed: Least number of samples that a number over the window must be over to be believed.
    """
    entries = record.entries(threshold.kind)
    # A bias in front of a batch norm has no gradient, and that is healthy.
    weights = {path: entry for path, entry in entries.items() if entry.is_weight} or entries
    values = _beside_the_last(threshold, weights) if threshold.is_relative else _numbers(threshold, entries)
    ill = {
        path: value
        for path, value in values.items()
        if _worst_of(threshold, value) > threshold.limit and _is_believed(threshold, entries[path], needed)
    }
    return {
        labelled(path, entries[path].module): _what(threshold, record, entries[path], ill[path])
        for path in sorted(ill, key=lambda path: -_worst_of(threshold, ill[path]))
    }


def sentence(threshold: Threshold, ill: Mapping[str, str]) -> str:
    """The sentences of the warning.

    Args:
        threshold: The number and its limit.
        ill: What :func:`ill_layers` found, at least one layer.
    """
    worst, *others = ill
    more = f" Above the limit as well: {listed(others, _MAX_LISTED)}." if others else ""
    return f"in {worst}, {ill[worst]}{more} Usual cures: {threshold.alarm.cures}."


def _numbers(threshold: Threshold, entries: Mapping[str, Entry]) -> dict[str, float]:
    return {
        path: entry.numbers[threshold.statistic]
        for path, entry in entries.items()
        if threshold.statistic in entry.numbers
    }


def _beside_the_last(threshold: Threshold, entries: Mapping[str, Entry]) -> dict[str, float]:
    numbers = _numbers(threshold, entries)
    positive = [value for value in numbers.values() if 0 < value < math.inf]
    # Where all are zero, they stay zero.
    last = positive[-1] if positive else 1.0
    return {path: value / last for path, value in numbers.items()}


def _worst_of(threshold: Threshold, value: float) -> float:
    """How bad a value is. A ratio is as bad as its inverse."""
    if not threshold.is_relative:
        return value
    return math.inf if value == 0 else max(value, 1 / value)


def _is_believed(threshold: Threshold, entry: Entry, needed: int) -> bool:
    if threshold.kind != "layer":
        return True
    is_over_enough = entry.samples >= needed or not threshold.alarm.of_window
    return entry.is_activation and entry.units > 0 and is_over_enough


def _what(threshold: Threshold, record: Record, entry: Entry, value: float) -> str:
    is_zero = threshold.is_relative and value == 0
    meaning = threshold.alarm.zero if is_zero else threshold.alarm.meaning
    if not is_zero and "{value}" not in meaning:
        meaning = f"{value:.0%} {meaning}"
    number = f"{_worst_of(threshold, value):.3g}"
    words = meaning.format(samples=entry.samples, value=number, side="smaller" if value < 1 else "larger")
    return f"{words} ({_PHASES[record.phase]}, step {record.step})."
