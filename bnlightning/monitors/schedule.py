"""The schedule of a monitor: the optimizer steps that it samples."""

from collections.abc import Mapping
from typing import Any


class Schedule:
    """The first step, and every step at which the number of optimizer steps has passed another multiple of ``every``.

    A monitor that watches several optimizers asks with a key for each of them. With a single key, an optimizer that
    steps in every second batch might never be due. The multiples of ``every`` could fall into the other batches.

    Args:
        every: Distance of two sampled steps in optimizer steps.

    Example:
        >>> schedule = Schedule(10)
        >>> [step for step in range(25) if schedule.is_due(step)]
        [0, 10, 20]
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: dict[int, int] = {}

    def start(self, step: int) -> bool:
        """Start a fit at ``step``.

        Returns:
            Whether the fit goes on from this schedule's last sampled step: after a checkpoint, or after another fit.
        """
        self._last = {key: last for key, last in self._last.items() if last < step}
        return bool(self._last)

    def is_due(self, step: int, key: int = 0) -> bool:
        """Whether ``step`` is to be sampled. A ``True`` is remembered: asked again at the same step, it is not due.

        Args:
            step: Number of optimizer steps taken before.
            key: Number of the optimizer.
        """
        last = self._last.get(key)
        # Not step % every: with several optimizers the number of steps jumps over multiples.
        if last is not None and step // self.every <= last // self.every:
            return False
        self._last[key] = step
        return True

    def state_dict(self) -> dict[int, int]:
        """The last sampled step by key, for a checkpoint."""
        return dict(self._last)

    def load_state_dict(self, state: Mapping[Any, int]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._last = {int(key): last for key, last in state.items()}
