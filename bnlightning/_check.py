"""Checks of what a user passed: each raises one message with the argument's name, the value received and the cure."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer (no bool) within the bounds."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and value >= at_least and (at_most is None or value <= at_most):
        return
    bound = f" of at least {at_least}" if at_most is None else f" from {at_least} to {at_most}"
    raise ValueError(f"{name}={value!r} is not possible: give an integer{bound}.")


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number within the bounds."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (above is None or value > above) and (at_least is None or value >= at_least):
        return
    bound = f" above {above:g}" if above is not None else f" of at least {at_least:g}" if at_least is not None else ""
    raise ValueError(f"{name}={value!r} is not possible: give a number{bound}.")


def check_share(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number from 0 to below 1, what a share can exceed."""
    if isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) < 1.0:
        return
    raise ValueError(f"{name}={value!r} is not possible: give a share from 0 to below 1, such as 0.5.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(choices)}.")
