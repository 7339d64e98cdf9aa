"""Which optimizer steps a monitor samples."""


class TrainingCadence:
    """The first step, and those at which the number of optimizer steps has passed another multiple of ``every``.

    Args:
        every: Distance in steps.
        last: The last step that was due, if there was one.
    """

    def __init__(self, every: int, last: int | None = None) -> None:
        self.every = every
        self.last = last

    def start(self) -> None:
        """A fit starts."""
        self.last = None

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is due; asked again at the same step, it is not."""
        # Not step % every: with several optimizers the count of steps leaps over multiples.
        if self.last is not None and step // self.every <= self.last // self.every:
            return False
        self.last = step
        return True
