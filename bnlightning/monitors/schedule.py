"""Which optimizer steps a monitor samples."""

from collections.abc import Mapping
from typing import Any


class Schedule:
    """The first step, and every step at which the number of optimizer steps has passed another multiple of ``every``.

    A monitor that watches several optimizers asks under a key for each. One that steps in every second batch would
    otherwise never be due if the multiples fall into the batches between.

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
        """A fit starts at ``step``.

        Returns:
            Whether it goes on from where this schedule is: after a checkpoint, or from the fit before.
        """
        self._last = {key: last for key, last in self._last.items() if last < step}
        return bool(self._last)

    def is_due(self, step: int, key: int = 0) -> bool:
        """Whether ``step`` is to be sampled. Asked again at the same step, it is not."""
        last = self._last.get(key)
        # Not step % every: with several optimizers the number of steps leaps over multiples.
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
