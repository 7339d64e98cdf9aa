"""What answers Ctrl-C and SIGTERM: in the command, and in the processes of its runs.

In a fit it is :class:`~bnlightning.PreemptionCheckpoint` that answers SIGTERM.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException


class Signals:
    """The signals that one command has got.

    Attributes:
        interrupted: Whether one of them was to end it.
    """

    def __init__(self) -> None:
        self.interrupted = False

    @contextmanager
    def answered(self, *, sigterm: bool) -> Iterator[None]:
        """Have signals end the command by an exception, so that nothing is left behind; not those that are ignored.

        Args:
            sigterm: Whether SIGTERM does, too. A process that waits for other ranks in torch would not hear it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        if sigterm and before[signal.SIGTERM] is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._interrupt)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` again if it was lost, as where the interpreter collects garbage."""
        if self.interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt


class StopOnce:
    """The answer of a worker to SIGTERM: it stops what it does, by an exception and only once, and begins nothing new.

    The process's table of handlers holds it.
    """

    def __init__(self) -> None:
        self._stops = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """End what the process does, unless it ends already."""
        if not self._stops:
            self._stops = True
            sys.exit(1)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call the function, unless this process was told to stop while it was busy with the one before."""
        if self._stops:
            return
        try:
            function(*arguments)
        except SIGTERMException:
            # A callback has answered the signal in the place of this.
            self._stops = True
            raise
        finally:
            # A callback may have left its own answer there.
            signal.signal(signal.SIGTERM, self)


def answer_in_worker() -> None:
    """Leave Ctrl-C to the command, and stop once on SIGTERM."""
    # On Windows nothing is inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, StopOnce())


def call_in_worker(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process that :func:`answer_in_worker` has prepared."""
    stop = signal.getsignal(signal.SIGTERM)
    assert isinstance(stop, StopOnce)
    stop.call(function, *arguments)


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C from before their first import: a terminal sends it to them, too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
