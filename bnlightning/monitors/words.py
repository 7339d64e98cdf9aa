"""Layers and errors in words: how a layer is called, how several are listed, how Markdown reads them, what failed."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def labelled(path: str, module: str) -> str:
    """A layer as people read it: its path and the class of its module.

    Example:
        >>> labelled("net.5", "ReLU"), labelled("net.5", "")
        ('net.5 (ReLU)', 'net.5')
    """
    return f"{path} ({module})" if module else path


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def escaped(text: str) -> str:
    r"""A text that Markdown shows as it stands, also in a table.

    Example:
        >>> print(escaped("net.act__1__ <b>|"))
        net.act\_\_1\_\_ &lt;b&gt;&#124;
    """
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "~": "&#126;"}
    marks = {mark: f"\\{mark}" for mark in "\\`*_{}[]#!"}
    return "".join((entities | marks).get(letter, letter) for letter in " ".join(text.split()))


class Mishaps:
    """Errors in what is only for show. Each is told once, as a warning, and the training goes on.

    Args:
        name: Whose errors they are, such as ``"ActivationMonitor"``.

    Example:
        >>> import warnings
        >>> mishaps = Mishaps("ActivationMonitor")
        >>> with warnings.catch_warnings(record=True, action="always") as caught, mishaps.forgiven("draw a picture"):
        ...     raise RuntimeError("no latex")
        >>> print(caught[0].message)
        ActivationMonitor could not draw a picture: RuntimeError: no latex. The training goes on without it.
    """

    def __init__(self, name: str = "A monitor") -> None:
        self.name = name
        self._told: set[str] = set()

    @contextmanager
    def forgiven(self, task: str) -> Iterator[None]:
        """Run a block whose errors must not end a training. What ends a process, such as Ctrl-C, still does.

        Args:
            task: What the block does, as the words behind "could not". It is warned of once.
        """
        try:
            yield
            return
        except Exception as error:
            failed = _in_words(error)
        if task not in self._told:
            self._told.add(task)
            warnings.warn(f"{self.name} could not {task}: {failed}. The training goes on without it.", stacklevel=3)


def _in_words(error: Exception) -> str:
    try:
        text = " ".join(str(error).split())[:300].rstrip(".")
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
