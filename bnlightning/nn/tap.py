"""The function that shows monitors a value that is no module's output, and the list of those who listen."""

from collections.abc import Callable

from torch import Tensor
from torch.fx import Proxy

Listener = Callable[[str, Tensor, tuple[float, float] | None], None]

_listeners: list[Listener] = []


def tap(x: Tensor, name: str, limits: tuple[float, float] | None = None) -> Tensor:
    """Show ``x`` to the monitors, as if it were the output of a module.

    Use it for activations that are called as functions. Without a monitor it does nothing.

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
    if isinstance(x, Proxy):
        # A graph is traced, and no value is there to be shown.
        return x
    if not isinstance(x, Tensor):
        raise ValueError(f"x of tap(x, {name!r}) is a {type(x).__name__}: give a tensor, and each tensor its own name.")
    if limits is not None and not (isinstance(limits, tuple | list) and len(limits) == 2):
        raise ValueError(f"limits={limits!r} of tap(x, {name!r}) is not possible: give a pair, such as (-0.99, 0.99).")
    for listener in _listeners:
        listener(name, x, limits)
    return x


def add_listener(listener: Listener) -> None:
    """Call ``listener(name, x, limits)`` in every :func:`tap` from now on."""
    _listeners.append(listener)


def remove_listener(listener: Listener) -> None:
    """Undo :func:`add_listener`. A second call does nothing."""
    if listener in _listeners:
        _listeners.remove(listener)
