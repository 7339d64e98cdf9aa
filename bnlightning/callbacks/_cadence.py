"""Which evaluations a callback looks at."""


class EvaluationCadence:
    """Evaluations that begin at least ``every_n_steps`` optimizer steps after the last one that was due."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._last: int | None = None

    def start(self, step: int) -> None:
        """A fit starts at ``step``; what was due later belongs to another one."""
        if self._last is not None and self._last > step:
            self._last = None

    def is_due(self, step: int) -> bool:
        """Whether the evaluation that begins at ``step`` is due."""
        if self._last is not None and step - self._last < self.every_n_steps:
            return False
        self._last = step
        return True
