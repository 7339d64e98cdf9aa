"""Letting monitors see values that no module puts out."""

from collections.abc import Callable

from torch import Tensor

Listener = Callable[[str, Tensor, tuple[float, float] | None], None]

_listeners: list[Listener] = []


def tap(x: Tensor, name: str, limits: tuple[float, float] | None = None) -> Tensor:
    """Show ``x`` to the monitors that watch a training, as if a module of that name had put it out.

    For activations that are called as functions: ``x = tap(torch.relu(self.fc(x)), "relu1")``. Without a monitor it
    does nothing.

    Args:
        x: Of any shape; it is not changed.
        name: Stands in the tags where a module's path does.
        limits: The values beyond which an activation counts as saturated, such as ``(-0.99, 0.99)`` for a tanh.

    Returns:
        ``x`` itself.

    Raises:
        ValueError: If ``x`` is no tensor, or ``limits`` no pair.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x of tap(x, {name!r}) is a {type(x).__name__}: give a tensor, and each tensor its own name.")
    if limits is not None and len(limits) != 2:
        raise ValueError(f"limits={limits!r} of tap(x, {name!r}) is not possible: give a pair, such as (-0.99, 0.99).")
    for listener in _listeners:
        listener(name, x, limits)
    return x


def add_listener(listener: Listener) -> None:
    """Have ``listener(name, x, limits)`` called by each :func:`tap`."""
    _listeners.append(listener)


def remove_listener(listener: Listener) -> None:
    """Undo :func:`add_listener`; nothing happens if that was done already."""
    if listener in _listeners:
        _listeners.remove(listener)
