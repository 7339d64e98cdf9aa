"""Limits that a user sets, and the sentence of the warning when a layer exceeds one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnlightning.compare.names import TEST, TRAIN, VAL
from bnlightning.monitors.record import Entry, Record
from bnlightning.monitors.statistic import Alarm, Statistic

_PHASES = {TRAIN: "training", VAL: "validation", TEST: "test"}
_MAX_LISTED = 5


@dataclass(frozen=True)
class Threshold:
    """One number of the layers, and its limit.

    Args:
        statistic: Name of the statistic.
        argument: Name of the argument that set the limit.
        limit: Share above which there is a warning, from 0 to below 1.
        alarm: The words of the warning.
    """

    statistic: str
    argument: str
    limit: float
    alarm: Alarm


def make_thresholds(limits: Mapping[str, float | None], statistics: Iterable[Statistic[Any]]) -> list[Threshold]:
    """The thresholds for the limits that are set.

    Args:
        limits: The limit by name of the statistic. ``None``: there is none.
        statistics: The declarations, which hold the words of the warnings.
    """
    return [
        Threshold(statistic.name, f"warn_{statistic.name}_above", limit, statistic.alarm)
        for statistic in statistics
        if statistic.alarm is not None and (limit := limits.get(statistic.name)) is not None
    ]


def exceeds(threshold: Threshold, record: Record, needed: int) -> str | None:
    """The sentence on the worst activation. ``None`` if no activation is above the threshold.

    Args:
        threshold: The number and its limit.
        record: The record of a sampled step or of an evaluation.
        needed: Least number of samples that a number over the window must be over to be believed.
    """
    ill = {path: layer for path, layer in record.layers.items() if _is_ill(layer, threshold, needed)}
    if not ill:
        return None
    worst = max(ill, key=lambda path: ill[path].numbers[threshold.statistic])
    share, samples = ill[worst].numbers[threshold.statistic], ill[worst].samples
    others = [path for path in ill if path != worst]
    more = f" Above the limit as well: {_listed(others)}." if others else ""
    meaning = threshold.alarm.meaning.format(samples=samples)
    where = f"{worst}, {_PHASES[record.phase]} at step {record.step}"
    return f"{where}: {share:.0%} {meaning}.{more} Usual cures: {threshold.alarm.cures}."


def _is_ill(layer: Entry, threshold: Threshold, needed: int) -> bool:
    share = layer.numbers.get(threshold.statistic, 0.0)
    is_believed = layer.samples >= needed or not threshold.alarm.needs_window
    return layer.is_activation and layer.units > 0 and is_believed and share > threshold.limit


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:_MAX_LISTED])
    return shown if len(paths) <= _MAX_LISTED else f"{shown} and {len(paths) - _MAX_LISTED} more"
