"""Checks of a user's arguments. Each raises one message that names the argument, the value and the cure."""

import inspect
import math
import os
import sys
from collections.abc import Callable, Collection
from numbers import Integral, Real
from types import BuiltinFunctionType, FunctionType
from typing import Any


def check_integer(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer within the bounds. A bool is not an integer here.

    Args:
        name: Name of the argument, for the message.
        value: Value to check.
        at_least: Smallest integer allowed.
        at_most: Largest integer allowed; by default there is none.

    Example:
        >>> check_integer("depth", 0, at_least=1)
        Traceback (most recent call last):
        ...
        ValueError: depth=0 is not possible: give an integer of at least 1.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and value >= at_least and (at_most is None or value <= at_most):
        return
    bound = f" of at least {at_least}" if at_most is None else f" from {at_least} to {at_most}"
    raise ValueError(f"{name}={value!r} is not possible: give an integer{bound}.")


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number within the bounds. A bool is not a number here.

    Args:
        name: Name of the argument, for the message.
        value: Value to check.
        above: Number that the value must exceed; by default there is none.
        at_least: Smallest number allowed; by default there is none.

    Example:
        >>> check_number("learning_rate", -0.1, above=0.0)
        Traceback (most recent call last):
        ...
        ValueError: learning_rate=-0.1 is not possible: give a number above 0.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (above is None or value > above) and (at_least is None or value >= at_least):
        return
    bound = f" above {above:g}" if above is not None else f" of at least {at_least:g}" if at_least is not None else ""
    raise ValueError(f"{name}={value!r} is not possible: give a number{bound}.")


def check_share(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number from 0 to below 1, a limit that a share can exceed.

    Args:
        name: Name of the argument, for the message.
        value: Value to check.

    Example:
        >>> check_share("warn_dead", 1.0)
        Traceback (most recent call last):
        ...
        ValueError: warn_dead=1.0 is not possible: give a share from 0 to below 1, such as 0.5.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) < 1.0:
        return
    raise ValueError(f"{name}={value!r} is not possible: give a share from 0 to below 1, such as 0.5.")


def check_limit(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number of at least 0, or ``None``, which is no limit.

    Args:
        name: Name of the argument, for the message.
        value: Value to check.

    Example:
        >>> check_limit("warn_mean_drift_above", "much")
        Traceback (most recent call last):
        ...
        ValueError: warn_mean_drift_above='much' is not possible: give a number of at least 0, or None.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value!r} is not possible: give a number of at least 0, or None.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``.

    Args:
        name: Name of the argument, for the message.
        value: Value to check.
        choices: The values allowed.

    Example:
        >>> check_choice("norm", "layer", ["none", "custom", "torch"])
        Traceback (most recent call last):
        ...
        ValueError: norm='layer' is not known: choose one of none, custom, torch.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(choices)}.")


def by_import_path(value: Any, is_wanted: Callable[[Any], bool] = callable) -> Any:
    """A class or function for its import path, as a configuration saves it. Any other value stays as it is.

    Only modules that are imported already count, so a word that is no import path has no side effects.

    Args:
        value: A value such as ``"torch.nn.ReLU"``.
        is_wanted: Whether what the path leads to is meant, and not a pattern that happens to read the same.

    Example:
        >>> by_import_path("collections.OrderedDict"), by_import_path("net.*")
        (<class 'collections.OrderedDict'>, 'net.*')
    """
    if not isinstance(value, str):
        return value
    parts = value.split(".")
    for number in range(len(parts) - 1, 0, -1):
        found = sys.modules.get(".".join(parts[:number]))
        if found is not None:
            for part in parts[number:]:
                found = getattr(found, part, None)
            return found if is_wanted(found) else value
    return value


def is_function_of_two(value: Any) -> bool:
    """Whether ``value`` is a function that can be called with two arguments.

    Example:
        >>> is_function_of_two(lambda path, module: True), is_function_of_two(dict)
        (True, False)
    """
    if not isinstance(value, FunctionType | BuiltinFunctionType):
        return False
    try:
        inspect.signature(value).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def check_path(name: str, value: str | os.PathLike[str]) -> None:
    r"""Raise ``ValueError`` if a full path is no text here, as where Python takes the names of files for ASCII.

    Args:
        name: Name of the argument, for the message.
        value: Path to check.

    Example:
        >>> check_path("directory", "/runs-\udcfc")
        Traceback (most recent call last):
        ...
        ValueError: directory='/runs-\udcfc' is no text in this locale: set PYTHONUTF8=1 or LC_ALL=C.UTF-8.
    """
    path = os.path.abspath(value)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={path!r} is no text in this locale: set PYTHONUTF8=1 or LC_ALL=C.UTF-8.") from error
