"""A figure becomes a PNG, the same on every machine and whatever settings of matplotlib the user has."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib's settings are global. Two contexts that overlap would restore each other's.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw with matplotlib's default settings within the block. The user's settings are there again behind it.

    Styles, LaTeX, fonts, resolutions and backends of the user change nothing within it.

    Example:
        >>> import matplotlib
        >>> with own_settings():
        ...     size = matplotlib.rcParams["font.size"]
        >>> size
        10.0
    """
    # Where it is needed, so that importing the package does not wait for matplotlib.
    import matplotlib.style

    with _ONE_AT_A_TIME, matplotlib.style.context("default"):
        yield


def draw_png(draw: Callable[[], "Figure"]) -> tuple[bytes, int, int]:
    """Draw a figure and encode it. It needs neither pyplot nor a backend with a window.

    Args:
        draw: Makes the figure.

    Returns:
        The encoded image, its width and its height.

    Example:
        >>> from matplotlib.figure import Figure
        >>> png, width, height = draw_png(lambda: Figure(figsize=(2, 1), dpi=50))
        >>> width, height
        (100, 50)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with own_settings():
        canvas = FigureCanvasAgg(draw())
        buffer = io.BytesIO()
        canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    width, height = canvas.get_width_height()
    return buffer.getvalue(), width, height
