"""What tells apart the states of several callbacks of one class in a checkpoint: their arguments, in words."""

import contextlib
import functools
import types
from collections.abc import Mapping, Sequence, Set
from typing import Any
from zlib import crc32


def described(value: Any) -> Any:
    """An argument as plain values whose ``repr`` is the same in every process.

    That of a function holds an address. A function is told apart by its name, its code, its defaults and what it closes
    over.

    Example:
        >>> described(["net.*", dict, len])
        ['net.*', 'builtins.dict', 'builtins.len']
    """
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, Mapping):
        return {described(key): described(one) for key, one in value.items()}
    if isinstance(value, Set):
        return sorted(map(repr, map(described, value)))
    if isinstance(value, Sequence):
        return [described(one) for one in value]
    if isinstance(value, functools.partial):
        return ["partial", described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, types.MethodType):
        return [described(value.__func__), described(value.__self__)]
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, type | types.BuiltinFunctionType):
        return _name(value)
    # Of other objects, what they hold, as far as it is plain.
    held = {name: one for name, one in getattr(value, "__dict__", {}).items() if isinstance(one, _SCALARS)}
    return [_name(type(value)), held] if held else _name(type(value))


_SCALARS = (bool, int, float, complex, str, bytes)


def _function(function: types.FunctionType) -> list[Any] | str:
    name = _name(function)
    # A function of a module is its name; one within another may be there several times.
    if "<" not in name:
        return name
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_cells(function)]
    # A function may close over itself.
    plain = [described(one) for one in held if isinstance(one, (*_SCALARS, Sequence, Mapping, type))]
    return [f"{name}:{_digest(function.__code__):08x}", *plain]


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _digest(code: types.CodeType) -> int:
    nested = [_digest(one) if isinstance(one, types.CodeType) else repr(described(one)) for one in code.co_consts]
    return crc32(repr((code.co_code.hex(), code.co_names, nested)).encode())


def _name(defined: Any) -> str:
    return f"{defined.__module__}.{defined.__qualname__}"
