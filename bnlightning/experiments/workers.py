"""Calls made at the same time, each in a process of its own."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from bnlightning.experiments.signals import answer_in_worker, call_in_worker, ignored_interrupts

# How long a process that was told to stop may take to write what it has in memory.
_SECONDS_TO_STOP = 10.0


def available_cores() -> int:
    """The cores that this process may use, which on shared machines are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that call functions for this one, each on one thread of torch's, none outliving it.

    Args:
        number: How many there are at most.
    """

    def __init__(self, number: int) -> None:
        # A forked child has torch's locks without the threads that would open them.
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(number, mp_context=context, initializer=_initialize)
        self._calls: list[Future[None]] = []

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function(*arguments)``, which can be pickled, as soon as a process is free."""
        with ignored_interrupts():
            self._calls.append(self._executor.submit(call_in_worker, function, *arguments))

    def wait(self) -> None:
        """Return when every call has ended.

        Raises:
            BaseException: What a call raised. Those that had begun by then are finished first, the others are left out.
        """
        done, _ = wait(self._calls, return_when=FIRST_EXCEPTION)
        self._executor.shutdown(cancel_futures=any(call.exception() for call in done))
        for call in self._calls:
            if not call.cancelled():
                call.result()

    def stop(self) -> None:
        """End the processes: by an exception in what they do, so that it can write what it has, or else by killing."""
        processes = multiprocessing.active_children()
        for process in processes:
            process.terminate()
        deadline = threading.Timer(_SECONDS_TO_STOP, _kill, [processes])
        deadline.start()
        self._executor.shutdown(cancel_futures=True)
        deadline.cancel()


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _initialize() -> None:
    answer_in_worker()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed could not tell its children, which would wait for calls for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
