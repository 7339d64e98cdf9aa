"""The function that shows monitors a value that is no module's output, and the list of those who listen."""

import sys
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

Limits = tuple[float, float]


class Listener(Protocol):
    """Who hears what :func:`tap` shows.

    Attributes:
        home: The thread that runs the listener's steps.
        is_sampling: Whether it listens now.
    """

    home: threading.Thread
    is_sampling: bool

    def watches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a part of the listener's network."""

    def hear(self, name: str, x: Tensor, limits: Limits | None) -> None:
        """Take a value."""

    def trace(self, name: str, x: Tensor, limits: Limits | None) -> None:
        """Take a value of a graph that is being traced for ``torch.compile``."""


_listeners: list[Listener] = []


def tap(x: Tensor, name: str, limits: tuple[float, float] | None = None) -> Tensor:
    """Show ``x`` to the monitors, as if it were the output of a module.

    Use it for activations that are called as functions. Without a monitor it does nothing. An exported, scripted or
    traced program has no trace of it.

    A monitor hears the taps of the thread that runs its steps. Where several monitors run in a thread, one inside the
    other, the innermost module that is running decides: those hear the tap that watch this module. The same decides in
    a thread that runs no steps, such as a worker that computes a part of the batch.

    Args:
        x: Tensor of any shape and dtype. It is not changed.
        name: Name in the tags, in the place of a module's path. A second call of the same name in one forward pass is
            shown as ``name#1``.
        limits: Lower and upper value beyond which an activation counts as saturated, such as ``(-0.99, 0.99)`` for a
            tanh. By default nothing counts as saturated.

    Returns:
        ``x`` itself.

    Raises:
        ValueError: If ``x`` is not a tensor, or ``limits`` is not a pair.

    Example:
        >>> class Network(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(3, 30)
        ...
        ...     def forward(self, x):
        ...         return tap(torch.relu(self.fc(x)), "relu1")
        >>> Network()(torch.randn(10, 3)).shape
        torch.Size([10, 30])
    """
    # TorchScript compiles neither what is behind this condition nor what that calls.
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _show(x, name, limits)
    return x


def add_listener(listener: Listener) -> None:
    """Let ``listener`` hear every :func:`tap` that is its own from now on."""
    _listeners.append(listener)


def remove_listener(listener: Listener) -> None:
    """Undo :func:`add_listener`. A second call does nothing."""
    if listener in _listeners:
        _listeners.remove(listener)


def listeners_here() -> list[Listener]:
    """Those who hear a value that is shown now, in this thread and inside the modules that are running."""
    known = list(_listeners)
    if not any(listener.is_sampling for listener in known):
        return []
    mine = [listener for listener in known if listener.home == threading.current_thread()]
    if len(mine) != 1:
        found = ([one for one in mine or known if one.watches(module)] for module in _running_modules())
        mine = next(filter(None, found), mine)
    return [listener for listener in mine if listener.is_sampling]


def _show(x: Tensor, name: str, limits: tuple[float, float] | None) -> None:
    if isinstance(x, torch.fx.Proxy):
        # torch.fx records a program.
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"x of tap(x, {name!r}) is a {type(x).__name__}: give a tensor, and each tensor its own name.")
    if limits is not None and not (isinstance(limits, tuple | list) and len(limits) == 2):
        raise ValueError(f"limits={limits!r} of tap(x, {name!r}) is not possible: give a pair, such as (-0.99, 0.99).")
    if torch.compiler.is_compiling():
        for listener in _listeners:
            listener.trace(name, x, limits)
    else:
        for listener in listeners_here():
            listener.hear(name, x, limits)


def _running_modules() -> Iterator[nn.Module]:
    """The modules whose methods are running in this thread, from the innermost outwards."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            yield first
        frame = frame.f_back  # type: ignore[assignment]
