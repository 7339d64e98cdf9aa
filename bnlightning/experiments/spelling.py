"""What a user may have meant: the keys that a configuration has, the nearest to a misspelt one, the values that fit."""

import inspect
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from hydra.utils import get_object

_MOST = 3
# Below, two names are different ones: `num_points` and `num_train`.
_NEAR_MISS = 0.75
_IN_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "null"}


def near(word: str, known: Iterable[str]) -> list[str]:
    """The known keys that are most like a word: of the same last name, of nearly the same letters, of these initials.

    Example:
        >>> near("norm", ["model.norm", "model.depth"]), near("modle.dpeth", ["model.norm", "model.depth"])
        (['model.norm'], ['model.depth'])
        >>> near("lr", ["model.learning_rate"])
        ['model.learning_rate']
    """
    keys = list(dict.fromkeys(known))
    lower = {key.lower(): key for key in keys}
    last: dict[str, list[str]] = {}
    for key in keys:
        last.setdefault(key.rpartition(".")[2].lower(), []).append(key)
    word = word.lower()
    name = word.rpartition(".")[2]
    if name in last:
        return last[name][:_MOST]
    if matches := get_close_matches(word, lower, 1):
        return [lower[matches[0]]]
    if matches := get_close_matches(name, last, 1):
        return last[matches[0]][:_MOST]
    initials = {key: "".join(part[:1] for part in key.rpartition(".")[2].split("_")) for key in keys}
    return [key for key in keys if initials[key] == name and len(name) > 1][:_MOST]


def is_known(key: str, contents: Mapping[str, Any]) -> bool:
    """Whether a configuration has the key, or something that is known only when a run begins in the place of it.

    Args:
        key: The key, with dots.
        contents: The configuration as nested mappings, interpolations as they are written.
    """
    return _walk(key, contents)[2] == ""


def may_be_added(key: str, contents: Mapping[str, Any], *, asked: bool) -> bool:
    """Whether a key that the configuration does not have means something.

    It does as an argument of the class whose arguments stand there, as what another value refers to, and in a mapping
    that holds whatever one likes.

    Args:
        key: The key, with dots.
        contents: The configuration as nested mappings.
        asked: Whether the user says that it is a new one.
    """
    node, above, missing = _walk(key, contents)
    if missing == "":
        return True
    if not isinstance(node, Mapping):
        # What is null may be given contents.
        return node is None and asked
    if not above:
        return asked and _is_referred_to(missing, contents)
    if re.fullmatch("_[a-z]+_", missing):
        return True
    if "_target_" in node:
        parameters = _parameters(str(node["_target_"]))
        return parameters is None or missing in parameters or (asked and "" in parameters)
    return asked and not get_close_matches(missing, node, 1, _NEAR_MISS)


def keys_of(contents: Mapping[str, Any]) -> list[str]:
    """All keys that may be given: those that are there, and the arguments of the classes."""
    return list(_keys("", contents))


def what_fits(key: str, contents: Mapping[str, Any], value: Any) -> str:
    """What a value would have to be, in words; empty if it may be right.

    Args:
        key: The key, with dots.
        contents: The configuration as nested mappings.
        value: What the user gives.
    """
    parent, _, name = key.rpartition(".")
    node, _, missing = _walk(parent, contents) if parent else (contents, "", "")
    if missing or not isinstance(node, Mapping):
        return ""
    if "_target_" in node:
        parameters = _parameters(str(node["_target_"])) or {}
        annotation = parameters.get(name, Any)
        return "" if _fits(annotation, value) else _either(list(dict.fromkeys(_in_words(annotation))))
    # Without a class the value that is there tells.
    before = node.get(name)
    one = before is not None and not isinstance(before, list | Mapping) and not _is_open(before)
    return "one value" if one and isinstance(value, list | Mapping) else ""


def _walk(key: str, contents: Any) -> tuple[Any, str, str]:
    """How far a key leads: the last that is there, its key, and the next part of the key, empty at its end."""
    node, above = contents, ""
    for part in key.split("."):
        if isinstance(node, list) or _is_open(node):
            return node, above, ""
        if not isinstance(node, Mapping) or part not in node:
            return node, above, part
        node, above = node[part], f"{above}.{part}".lstrip(".")
    return node, above, ""


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def _is_referred_to(name: str, contents: Any) -> bool:
    if isinstance(contents, Mapping):
        return any(_is_referred_to(name, value) for value in contents.values())
    if isinstance(contents, list):
        return any(_is_referred_to(name, value) for value in contents)
    return isinstance(contents, str) and re.search(rf"\$\{{(?:oc\.select:)?{re.escape(name)}\b", contents) is not None


def _keys(above: str, contents: Mapping[str, Any]) -> Iterator[str]:
    names = [str(name) for name in contents]
    if "_target_" in contents:
        names += (name for name in _parameters(str(contents["_target_"])) or {} if name)
    for name in dict.fromkeys(names):
        if not re.fullmatch("_[a-z]+_", name):
            yield f"{above}{name}"
            value = contents.get(name)
            if isinstance(value, Mapping):
                yield from _keys(f"{above}{name}.", value)


def _parameters(target: str) -> dict[str, Any] | None:
    """The types of what a class or a function takes, by name; under the empty name if it takes any; else ``None``."""
    try:
        called = get_object(target)
        parameters = inspect.signature(called).parameters.values()
    except Exception:
        # It will be told where it is called.
        return None
    try:
        types = typing.get_type_hints(getattr(called, "__init__") if isinstance(called, type) else called)  # noqa: B009
    except Exception:
        types = {}
    return {
        "" if parameter.kind is parameter.VAR_KEYWORD else parameter.name: types.get(parameter.name, Any)
        for parameter in parameters
        if parameter.kind is not parameter.VAR_POSITIONAL
    }


def _fits(annotation: Any, value: Any) -> bool:
    if annotation is Any or _is_open(value) or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if get_origin(annotation) in (typing.Union, UnionType):
        return any(_fits(choice, value) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if annotation is NoneType:
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    if annotation is str:
        # The class itself knows which texts.
        return not isinstance(value, list | Mapping)
    return not isinstance(value, list) or _holds_many(get_origin(annotation) or annotation)


def _holds_many(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Collection | Iterable) and not issubclass(kind, Mapping)


def _either(choices: list[str]) -> str:
    return " or ".join(choices) if len(choices) < 4 else f"one of {', '.join(choices)}"


def _in_words(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) in (typing.Union, UnionType):
        for choice in get_args(annotation):
            yield from _in_words(choice)
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        yield _IN_WORDS.get(annotation) or str(getattr(get_origin(annotation) or annotation, "__name__", annotation))
