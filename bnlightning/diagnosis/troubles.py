"""The state of every warning of a training: since when there is trouble, where, and when it ended."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bnlightning.monitors.words import escaped

Place = tuple[str, str]
"""A phase and a layer."""

_MAX_ROWS = 30
_MAX_TOLD = 3


@dataclass(frozen=True)
class Trouble:
    """One thing that is or was wrong with one layer.

    Args:
        rule: What was looked for, such as ``"ActivationMonitor(warn_dead_above=0.5)"``.
        layer: The layer with its class, or whatever else it is.
        what: What is wrong there, as a sentence.
        since: Step at which it was first seen.
        until: Step at which it was seen no more. ``None``: it goes on.
    """

    rule: str
    layer: str
    what: str
    since: int
    until: int | None = None


@dataclass(frozen=True)
class Change:
    """What a new record changed.

    Args:
        began: Whether there is trouble now and was none before.
        ended: Whether there was trouble before and is none now.
        is_told: Whether people are told on the console. They are for the first few times, the table has all.
    """

    began: bool
    ended: bool
    is_told: bool


class Troubles:
    """The troubles that a monitor warned of, for a table in which each has a row.

    Example:
        >>> troubles = Troubles()
        >>> rule = "warn_dead_above=0.5"
        >>> troubles.update(rule, "train", 10, {"net.1 (ReLU)": "60% of its units are dead."}).began
        True
        >>> troubles.update(rule, "train", 20, {}).ended
        True
        >>> [(each.layer, each.since, each.until) for each in troubles.rows]
        [('net.1 (ReLU)', 10, 20)]
    """

    def __init__(self) -> None:
        self._rows: list[Trouble] = []
        # By rule, where it goes on now, and the row of that.
        self._open: dict[str, dict[Place, int]] = {}
        self._times: dict[str, int] = {}
        self.step = 0

    @property
    def rows(self) -> list[Trouble]:
        """All troubles, newest first."""
        return sorted(self._rows, key=lambda each: each.since, reverse=True)

    def update(self, rule: str, phase: str, step: int, ill: Mapping[str, str]) -> Change:
        """Take down what a record says about one rule.

        Args:
            rule: What was looked for.
            phase: Phase of the record. What is wrong in one phase does not end in another.
            step: Step of the record.
            ill: What is wrong now, by layer.
        """
        self.step = max(self.step, step)
        going_on = self._open.setdefault(rule, {})
        was_ill = bool(going_on)
        for place in [place for place in going_on if place[0] == phase and place[1] not in ill]:
            row = going_on.pop(place)
            self._rows[row] = replace(self._rows[row], until=step)
        for layer, what in ill.items():
            if (phase, layer) not in going_on:
                going_on[phase, layer] = len(self._rows)
                self._rows.append(Trouble(rule, layer, what, step))
        began, ended = bool(going_on) and not was_ill, was_ill and not going_on
        self._times[rule] = self._times.get(rule, 0) + began
        return Change(began, ended, self._times[rule] <= _MAX_TOLD)

    def is_open(self, rule: str) -> bool:
        """Whether there is such trouble now."""
        return bool(self._open.get(rule))

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values, for a checkpoint."""
        return {
            "rows": [dict(vars(row)) for row in self._rows],
            "open": {rule: [[*place, row] for place, row in rows.items()] for rule, rows in self._open.items()},
            "times": dict(self._times),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._rows = [Trouble(**row) for row in state["rows"]]
        self._open = {rule: {(phase, layer): row for phase, layer, row in rows} for rule, rows in state["open"].items()}
        self._times = dict(state["times"])
        self.step = state["step"]


def table(troubles: list[Troubles], looked_for: list[str], unset: list[str], step: int) -> str:
    r"""The warnings of several monitors in Markdown, newest first. Words if there are none.

    Args:
        troubles: Those of each monitor.
        looked_for: The rules of all monitors.
        unset: The arguments of all monitors that set no limit.
        step: Step up to which they looked.

    Example:
        >>> print(table([Troubles()], ["NaN and infinities"], ["warn_dead_above"], 200))
        Nothing that was looked for was found up to step 200.
        <BLANKLINE>
        Looked for: NaN and infinities. **Not looked for**, since no limit is set: warn\_dead\_above.
    """
    rules = f"Looked for: {', '.join(map(escaped, looked_for)) or 'nothing, since no limit is set'}."
    if unset:
        rules += f" **Not looked for**, since no limit is set: {', '.join(map(escaped, unset))}."
    rows = sorted((row for each in troubles for row in each.rows), key=lambda row: row.since, reverse=True)
    if not rows:
        found = "Nothing that was looked for was found" if unset else "**Nothing found**"
        return f"{found} up to step {step}.\n\n{rules}"
    # What goes on is never among those that are left out, unless there is too much of it.
    kept = sorted(rows, key=lambda row: row.until is not None)[:_MAX_ROWS]
    lines = ["| since step | layer | what | state |", "|---|---|---|---|"]
    for row in sorted(kept, key=lambda row: row.since, reverse=True):
        state = "**goes on**" if row.until is None else f"ended at step {row.until}"
        lines.append(f"| {row.since} | {escaped(row.layer)} | {escaped(_capital(row.what))} | {state} |")
    left_out = [f"{len(rows) - len(kept)} more are left out."] if len(rows) > len(kept) else []
    return "\n".join([*lines, "", *left_out, f"As of step {step}. {rules}"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
