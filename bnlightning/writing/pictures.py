"""Pictures of a whole run, drawn from its history: how each layer's values move, and which layers are ill when.

White is measured and healthy, a colour is an illness, red is NaN or infinite. What was not measured is hatched.

A figure has few axes, with several images in each. Sixteen axes would take half a second to draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlightning.monitors.statistic import Look, Palette
from bnlightning.monitors.words import labelled
from bnlightning.writing.history import Distribution, History, evenly, nonzero_edges, nonzero_shares

Looks = Mapping[str, Look | None]

# matplotlib is imported where it draws, so that importing the package does not wait for it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Left, top, width and height. All lengths are pixels from the top left corner.
Box = tuple[float, float, float, float]

_DPI = 100
_WIDTH = 960
_MARGIN = 14
_GAP = 22
_HEAD = 94
_SHORT_HEAD = 56
_SCALES = 64
_FOOT = 46
_CAPTION = 21
# Odd, so that zero is in the middle of a row if the range is symmetric.
_ROWS = 33
_MAX_PANELS = 16
_PANELS_A_COLUMN = 8
_MAX_LABELS = 60
# This is several screens high. Older versions of matplotlib draw no more than 65535 pixels.
_MAX_ROWS = 4096
_MAX_NAME = 36
_MAX_MODULE = 20
# The palest colour of an illness, which white must not be taken for.
_PALEST = 0.2
# Illnesses that a caption names.
_MAX_WORDS = 2
# A distribution's colours are log(1 + count), with counts as in a layer of so many values.
_VALUES = 1000
# A panel's range covers samples whose values are at most this many times as large as is usual in the run.
_UNUSUAL = 4.0
# This value of an image lies above all colours, which are in [0, 1].
NONFINITE = 2.0

_NEUTRAL_COLORS = ("#ffffff", "#d6e6f4", "#8bc0dd", "#3787c0", "#08488e", "#041c40")
_ALARM_COLORS = ("#ffffff", "#fee0b6", "#fdae61", "#e8701a", "#a63603", "#5a1c00")
_TWO_SIDED_COLORS = ("#7f3b08", "#e08214", "#fee0b6", "#ffffff", "#d8daeb", "#8073ac", "#2d004b")
_PALETTES = {
    "neutral": _NEUTRAL_COLORS,
    "alarm": _ALARM_COLORS,
    "low": _ALARM_COLORS,
    "two_sided": _TWO_SIDED_COLORS,
}
_RED = "#e3001b"
_HATCH, _HATCHED = "#8c8c8c", "#efefef"
_DIM = "#555555"
_FRAME = "#a0a0a0"


# For each kind the title and what the rows and the colours are.
_SURFACES = {
    "layer": (
        "The state of every layer at every sampled training step",
        "{shown} in forward order, the first at the top. White is measured and healthy, a colour is not. Dead units "
        "are dormant, too.",
    ),
    "param": (
        "The gradient of every layer at every sampled training step",
        "{shown} in the network's order. White is measured and healthy. Orange: too small, "
        "vanishing. Purple: too large, exploding.",
    ),
    "norm": (
        "The state of every batch norm layer at every sampled step",
        "{shown} in the network's order. White is measured and healthy. With a colour, evaluation may differ from "
        "training.",
    ),
}
_NAMES = {"layer": "layers", "param": "weights", "norm": "batch norm layers"}


def _color(look: Look, values: NDArray[Any]) -> NDArray[np.float64]:
    """The colours of values in [0, 1]. White, which is healthy, is 0.5 of two sides and 0 otherwise. NaN stays NaN."""
    place = _place(look, values)
    if look.palette == "neutral" or (look.healthy is None and look.palette == "two_sided"):
        return place
    low, high = look.healthy or {"low": (look.high, np.inf)}.get(look.palette, (-np.inf, look.low))
    start, end = _place(look, np.array([low, high]))
    with np.errstate(divide="ignore", invalid="ignore"):
        below, above = place / start, (place - end) / (1 - end)
    if look.palette == "two_sided":
        colors = np.where(values < low, (0.5 - _PALEST / 2) * below, 0.5)
        colors = np.where(values > high, 0.5 + _PALEST / 2 + (0.5 - _PALEST / 2) * above, colors)
    elif look.palette == "low":
        colors = np.where(values < low, 1 - (1 - _PALEST) * below, 0.0)
    else:
        colors = np.where(values > high, _PALEST + (1 - _PALEST) * above, 0.0)
    return np.asarray(np.where(np.isnan(values), np.nan, colors), dtype=np.float64)


def _place(look: Look, values: NDArray[Any]) -> NDArray[np.float64]:
    """The places of values on the scale, from 0 at ``look.low`` to 1 at ``look.high``. NaN stays NaN."""
    ends = np.array([look.low, look.high])
    clipped = np.clip(values.astype(np.float64), *ends)
    if look.log:
        ends, clipped = np.log(ends), np.log(clipped)
    return np.asarray((clipped - ends[0]) / (ends[1] - ends[0]), dtype=np.float64)


def _worst(look: Look, colors: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """For every ``group`` neighbouring rows the colour furthest from the pale one. NaN if they have none."""
    rows = np.pad(colors, ((0, -len(colors) % group), (0, 0)), constant_values=np.nan)
    rows = rows.reshape(-1, group, colors.shape[1])
    distances = np.nan_to_num(np.abs(rows - (0.5 if look.palette == "two_sided" else 0.0)), nan=-1.0)
    return np.take_along_axis(rows, distances.argmax(axis=1)[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class Panel:
    """The distribution of a layer's values in each sample.

    Args:
        low: Lower edge of the first row. Values below it are in that row, too.
        high: Upper edge of the last row. Values above it are in that row, too.
        shares: Share of all values in each row, shape ``(rows, samples)``. NaN where there is no sample.
        nonfinite: Share of NaN and infinities, shape ``(samples,)``.
    """

    low: float
    high: float
    shares: NDArray[np.float64]
    nonfinite: NDArray[np.float64]

    def image(self) -> NDArray[np.float64]:
        """Colours in [0, 1], shape ``(rows, samples)``.

        The share of NaN and infinities fills as much from the top with ``NONFINITE``, but enough to be seen.
        """
        marked = np.where(self.nonfinite > 0, np.ceil(_ROWS * np.maximum(self.nonfinite, 0.3)), 0)
        return np.where(np.arange(_ROWS)[:, None] >= _ROWS - marked, NONFINITE, _log_color(self.shares))


def value_panel(distributions: Sequence[Distribution | None]) -> Panel:
    """The panel of one layer. Its range holds nearly all values of the usual samples.

    Args:
        distributions: One for each sample. ``None`` for a sample without one.
    """
    columns = [column for column, distribution in enumerate(distributions) if distribution is not None]
    sampled = [distribution for distribution in distributions if distribution is not None]
    low, high = _value_range([distribution for distribution in sampled if distribution.nonfinite < 1])
    shares = np.full((_ROWS, len(distributions)), np.nan)
    nonfinite = np.zeros(len(distributions))
    edges = np.linspace(low, high, _ROWS + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    zero = int(np.clip(np.floor(_ROWS * -low / (high - low)), 0, _ROWS - 1))
    cumulative = np.cumsum(np.pad(nonzero_shares(sampled), ((0, 0), (1, 0))), axis=1)
    for column, distribution, x, y in zip(columns, sampled, nonzero_edges(sampled), cumulative, strict=True):
        shares[:, column] = np.diff(np.interp(edges, x, y))
        shares[zero, column] += distribution.zeros
        nonfinite[column] = distribution.nonfinite
    return Panel(low, high, shares, nonfinite)


def _value_range(distributions: Sequence[Distribution]) -> tuple[float, float]:
    if not distributions:
        return -1.0, 1.0
    lows, highs, least, greatest = _limits(distributions)
    if least.min() >= -1 and greatest.max() <= 1 and highs.max() - lows.min() > 0.5:
        return (-1.0 if least.min() < 0 else 0.0), 1.0
    magnitudes = np.maximum(np.abs(lows), np.abs(highs))
    if not magnitudes.any():
        return 0.0, 1.0
    # The lower one of two medians, since the larger half is where a run explodes.
    bound = _UNUSUAL * float(np.quantile(magnitudes[magnitudes > 0], 0.5, method="lower"))
    usual = magnitudes <= bound
    return _rounded(lows[usual].min(), highs[usual].max())


def _limits(distributions: Sequence[Distribution]) -> NDArray[np.float64]:
    """The limits of each distribution, shape ``(4, distributions)``.

    The first two rows are edges of bins, and 99 % of the finite values lie between them. The last two rows are edges of
    the outermost bins with a value. They are the edges nearer to zero, since a tanh's 1.0 is in a bin that begins
    there.
    """
    edges, shares = nonzero_edges(distributions), nonzero_shares(distributions)
    # The outermost bins end only where float32 does.
    edges[:, 0], edges[:, -1] = edges[:, 1], edges[:, -2]
    middle = shares.shape[1] // 2
    shares = np.insert(shares, middle, [distribution.zeros for distribution in distributions], axis=1)
    lower, upper = np.insert(edges[:, :-1], middle, 0.0, axis=1), np.insert(edges[:, 1:], middle, 0.0, axis=1)
    cumulative = np.cumsum(shares, axis=1) / shares.sum(axis=1, keepdims=True)
    first, last = (cumulative > 0.005).argmax(axis=1), (cumulative >= 0.995).argmax(axis=1)
    outermost = (shares > 0).argmax(axis=1), shares.shape[1] - 1 - (shares > 0)[:, ::-1].argmax(axis=1)
    inner = np.where(np.abs(lower) < np.abs(upper), lower, upper)
    rows = np.arange(len(shares))
    return np.stack([lower[rows, first], upper[rows, last], *(inner[rows, bins] for bins in outermost)])


def _rounded(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty and easy to read.

    It ends in zero if it lies on one side and reaches close to zero. It is symmetric if it is about as wide on both
    sides.
    """
    if 0 <= low < 0.5 * high:
        low = 0.0
    elif 0 >= high > 0.5 * low:
        high = 0.0
    elif max(-low, high) < 3 * min(-low, high):
        low, high = min(low, -high), max(-low, high)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _log_color(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    # The sum of rounded shares may exceed 1, and would then have the colour of NONFINITE.
    colors: NDArray[np.float64] = np.minimum(np.log1p(_VALUES * shares) / np.log1p(_VALUES), 1.0)
    return colors


def surface_image(history: History, statistic: str, looks: Looks) -> NDArray[np.float64]:
    """The colours of a statistic, in [0, 1], shape ``(layers, samples)``. NaN where it was not measured.

    ``NONFINITE`` where the value is infinite, or where there is none for the NaN or infinities among the layer's
    values. If all of these are NaN or infinite, a statistic says nothing, either.
    """
    values = history.values(statistic)
    name = next((name for name in looks if _is_nonfinite(name)), "nonfinite")
    nonfinite = history.values(name)
    look = _look(history, statistic, looks)
    image = _color(look, _beside_the_last(values) if look.relative else values)
    nothing = ((nonfinite == 1) | ((nonfinite > 0) & np.isnan(values))) & _is_known(values)[:, None]
    image[np.isinf(values) | nothing | ((values > 0) & (statistic == name))] = NONFINITE
    return image


def _is_nonfinite(statistic: str) -> bool:
    return statistic in ("nonfinite", "grad_nonfinite")


def _beside_the_last(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The values divided by that of the last layer at the same step, of the last one that is neither zero nor NaN."""
    wide = values.astype(np.float64)
    is_there = np.isfinite(wide) & (wide > 0)
    last = len(wide) - 1 - is_there[::-1].argmax(axis=0)
    found = wide[last, np.arange(wide.shape[1])]
    # Where all are zero, they stay zero.
    return np.asarray(wide / np.where(is_there.any(axis=0), found, 1.0), dtype=np.float64)


def _is_known(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a layer has any value of a statistic, bool of shape ``(layers,)``."""
    return np.asarray(~np.isnan(values).all(axis=1))


def _look(history: History, statistic: str, looks: Looks) -> Look:
    look = looks[statistic]
    if look is not None:
        return look
    values = history.values(statistic)
    values = values[np.isfinite(values) & (values > 0)].astype(np.float64)
    middle = float(np.quantile(values, 0.5, method="lower")) if len(values) else 1.0
    low, high = max(values.min(initial=middle), middle / 1e3), min(values.max(initial=middle), middle * 1e3)
    if high < 10 * low:
        low, high = middle / 10**0.5, middle * 10**0.5
    return Look(statistic, "neutral", low, high, {x: f"{x:.2g}" for x in (low, (low * high) ** 0.5, high)}, log=True)


def draw_distributions(history: History, looks: Looks) -> "Figure":
    """Draw a heat map for each of up to 16 layers: training steps to the right, values upwards, colours for log counts.

    Args:
        history: The samples of the run.
        looks: The statistics that a caption may mention, worst first.
    """
    layers = evenly(history.chosen_layers, _MAX_PANELS)
    num_columns = 1 if len(layers) <= _PANELS_A_COLUMN else 2
    num_rows = -(-len(layers) // num_columns)
    panel_height = _ROWS * (4 - num_columns)
    column_height = max(num_rows, 1) * (panel_height + _CAPTION)
    figure, page = _page(_HEAD + column_height + _FOOT)
    order = "the first at the top" if num_columns == 1 else "the first at the top left, then down"
    _write_head(
        page,
        "How the values of each layer are distributed while training",
        f"{_number(layers, history)} in forward order, {order}. "
        "Upwards: the value, with all beyond the scale at its edges.",
    )
    if not layers:
        _say_nothing(page)
        return figure
    ticks = {float(_log_color(np.array(share))): f"{100 * share:.3g} %" for share in (0, 0.01, 0.1, 1)}
    _draw_scale(page, (_MARGIN, 62, 240, 8), Look("", "neutral", ticks=ticks))
    page.text(_MARGIN + 252, 71, "of the layer's values at a step", fontsize=9)
    page.text(
        _WIDTH - _MARGIN,
        71,
        "on the right: at the last step; units over the last samples",
        fontsize=8.5,
        color=_DIM,
        ha="right",
    )
    words = _last_words(history, looks)
    width = _WIDTH / num_columns
    for column in range(num_columns):
        box = (column * width + 62, _HEAD, width - 62 - _MARGIN, column_height)
        axes = _add_axes(figure, box)
        for row, layer in enumerate(layers[column * num_rows : (column + 1) * num_rows]):
            top = row * (panel_height + _CAPTION) + _CAPTION
            panel = value_panel(history.distributions(layer))
            _draw_panel(axes, panel, step_edges(history), top, top + panel_height)
            _write_caption(axes, panel, (layer, history.module_of(layer)), words.get(layer, ""), top, box[2])
        axes.set_ylim(column_height, 0)
        axes.set_yticks([])
        _draw_steps(axes, history, box[2])
    return figure


def _draw_panel(axes: "Axes", panel: Panel, edges: NDArray[np.float64], top: float, bottom: float) -> None:
    _hatch(axes, edges, (bottom, top), panel.shares)
    _draw_image(axes, edges, np.linspace(bottom, top, _ROWS + 1), panel.image(), "neutral")
    axes.plot(edges[[0, -1, -1, 0, 0]], [bottom, bottom, top, top, bottom], color=_FRAME, linewidth=0.8, clip_on=False)
    values = [(bottom, panel.low, "bottom"), (top, panel.high, "top")]
    zero = -panel.low / (panel.high - panel.low)
    if 0.15 < zero < 0.85:
        values.append((bottom + zero * (top - bottom), 0.0, "center"))
    for y, value, align in values:
        axes.annotate(
            f"{value:.3g}",
            (edges[0], y),
            (-4, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=_DIM,
            ha="right",
            va=align,
        )


def _write_caption(axes: "Axes", panel: Panel, layer: tuple[str, str], words: str, top: float, width: float) -> None:
    across = axes.get_yaxis_transform()
    name = _row_name(*layer, int(width / 7.5) - len(words))
    axes.text(0, top - 3, name, transform=across, fontsize=8.5, weight="bold", parse_math=False)
    color = _RED if panel.nonfinite[-1] else _DIM
    axes.text(1, top - 3, words, transform=across, fontsize=8.5, color=color, ha="right", parse_math=False)


def _last_words(history: History, looks: Looks) -> dict[str, str]:
    """For each layer what is ill in its last sample, worst first, in words. Without an illness what stands out."""
    ill: dict[str, list[str]] = {}
    well: dict[str, str] = {}
    broken: set[str] = set()
    for statistic, look in looks.items():
        if look is None or look.word is None:
            continue
        for layer, share in zip(history.layers, history.values(statistic)[:, -1].tolist(), strict=True):
            if not share > look.word_above:
                continue
            words = f"{100 * share:.0f} % {look.word}" if share >= 0.01 else f"< 1 % {look.word}"
            well.setdefault(layer, words)
            if share > (look.healthy[1] if look.healthy else look.low):
                ill.setdefault(layer, []).append(words)
                # Of other numbers nothing is known then.
                broken |= {layer} if _is_nonfinite(statistic) else set()
    return well | {
        layer: words[0] if layer in broken else ", ".join(words[:_MAX_WORDS]) for layer, words in ill.items()
    }


def draw_surfaces(history: History, looks: Looks, kind: str = "layer") -> "Figure":
    """Draw a heat map for each statistic: training steps to the right, layers downwards in forward order.

    Statistics without any value are left out. So are layers that have none of the statistics. With thousands of layers,
    neighbours share a row, which shows the worst of them.

    Args:
        history: The samples of the run.
        looks: The look of each statistic, in the order of the heat maps. ``None``: a logarithmic scale over its own
            range, for positive values.
        kind: ``"layer"``, ``"param"`` or ``"norm"``, as in tags.
    """
    shown = [statistic for statistic in looks if _is_known(history.values(statistic)).any()]
    known = np.zeros(len(history.layers), dtype=bool)
    for statistic in shown:
        known |= _is_known(history.values(statistic))
    layers = [layer for layer, is_known in zip(history.layers, known, strict=True) if is_known]
    shown_of = _number(layers, history, kind)
    group = max(-(-len(layers) // _MAX_ROWS), 1)
    if group > 1:
        shown_of += f", the worst of every {group} a row,"
        layers = layers[::group]
    row_height = np.clip(400 / max(len(layers), 1), 12, 24) if len(layers) <= _MAX_LABELS else 1
    # With more layers than labels, a row may be a single pixel, but not less.
    height = max(round(len(layers) * row_height), 36 if len(layers) <= _MAX_LABELS else 720)
    figure, page = _page(_SHORT_HEAD + _SCALES + height + _FOOT)
    title, text = _SURFACES[kind]
    _write_head(page, title, text.format(shown=shown_of), has_white=True)
    if not shown:
        _say_nothing(page)
        return figure
    most = _MAX_NAME if len(shown) <= 4 else _MAX_NAME - 8
    names = [_row_name(layer, history.module_of(layer), most) for layer in layers]
    left = _MARGIN + 10 + 6.2 * max(len(name) for name in names)
    pitch = (_WIDTH - _MARGIN + _GAP - left) / len(shown)
    for column, statistic in enumerate(shown):
        box = (left + column * pitch, _SHORT_HEAD + _SCALES, pitch - _GAP, height)
        axes = _add_axes(figure, box)
        image = _worst(_look(history, statistic, looks), surface_image(history, statistic, looks)[known], group)
        _draw_surface(page, axes, box, history, _look(history, statistic, looks), image)
        _name_rows(axes, names if column == 0 else [])
    return figure


def _draw_surface(
    page: "Axes", axes: "Axes", box: Box, history: History, look: Look, image: NDArray[np.float64]
) -> None:
    left, top, width, _ = box
    page.text(left, top - 50, _drawable(look.title), fontsize=9, weight="bold", parse_math=False)
    if look.ticks:
        _draw_scale(page, (left, top - 44, width, 7), look)
    page.text(left, top - 7, _healthy_in_words(look), fontsize=7.5, color=_DIM)
    _hatch(axes, step_edges(history), (-0.5, len(image) - 0.5), image)
    _draw_image(axes, step_edges(history), np.linspace(-0.5, len(image) - 0.5, len(image) + 1), image, look.palette)
    axes.set_ylim(len(image) - 0.5, -0.5)
    axes.spines[:].set(visible=True, color=_FRAME)
    _draw_steps(axes, history, width)


def _healthy_in_words(look: Look) -> str:
    """What is white, and so healthy."""
    if not look.ticks:
        return "white: none, red: any"
    if look.palette == "neutral":
        return ""
    low, high = look.healthy or (look.low, look.low)
    if look.palette == "low":
        return f"white: from {low:g} up"
    if look.palette == "two_sided":
        return f"white: {low:g} to {high:g}"
    return f"white: up to {high:g}" if high > 0 else "white: 0"


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    every = -(-len(names) // _MAX_LABELS)
    axes.set_yticks(range(0, len(names), max(every, 1)))
    axes.set_yticklabels(names[:: max(every, 1)], fontsize=7.5, parse_math=False)


def step_edges(history: History) -> NDArray[np.float64]:
    """The edges of the columns, shape ``(samples + 1,)``.

    A sample stands until the next one. The last one is as wide as the median.
    """
    steps = history.steps.astype(np.float64)
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return np.append(steps, steps[-1] + usual)


def _page(height: float) -> tuple["Figure", "Axes"]:
    """An empty figure, and axes that cover it and whose unit is a pixel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    page = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    page.set_xlim(0, _WIDTH)
    page.set_ylim(height, 0)
    page.set_axis_off()
    return figure, page


def _add_axes(figure: "Figure", box: Box) -> "Axes":
    left, top, width, height = box
    total = figure.get_figheight() * _DPI
    axes = figure.add_axes((left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total))
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2, pad=2, labelsize=8)
    return axes


def _write_head(page: "Axes", title: str, text: str, has_white: bool = False) -> None:
    page.text(_MARGIN, 24, title, fontsize=13, weight="bold")
    page.text(_MARGIN, 36, text, fontsize=9, va="top", linespacing=1.3)
    legend = [(118, _HATCHED, "not measured", "//////"), (236, _RED, "NaN or infinite", "")]
    for right, color, meaning, hatch in [*legend, *([(310, "#ffffff", "healthy", "")] if has_white else [])]:
        left = _WIDTH - right
        page.fill_between([left, left + 13], 14, 27, facecolor=color, edgecolor=_HATCH, linewidth=0.8, hatch=hatch)
        page.text(left + 18, 25, meaning, fontsize=8.5)


def _say_nothing(page: "Axes") -> None:
    page.text(_MARGIN, _HEAD, "Nothing has been sampled yet.", fontsize=10)


def _number(layers: Sequence[str], history: History, kind: str = "layer") -> str:
    total = len(history.layers)
    return f"{len(layers)} of {total} {_NAMES[kind]}" if len(layers) < total else f"The {_NAMES[kind]}"


def _row_name(path: str, module: str, length: int) -> str:
    """A layer's path with the class of its module, in at most so many characters."""
    module = module if len(module) <= _MAX_MODULE else f"{module[: _MAX_MODULE - 1]}…"
    room = max(length - len(labelled("", module)), 8)
    return _drawable(labelled(_shortened(path, room), module))


def _shortened(name: str, length: int) -> str:
    """A name without its beginning, if it is too long. The end of a path says more."""
    return name if len(name) <= length else "…" + name[len(name) - length + 1 :].lstrip(".")


def _drawable(text: str) -> str:
    """The text with a question mark for each character that the font does not have."""
    if text.isascii() and text.isprintable():
        return text
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(letter if ord(letter) in known and letter.isprintable() else "?" for letter in text)


def _draw_steps(axes: "Axes", history: History, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    edges = step_edges(history)
    locator = MaxNLocator(max(int(width / 60), 1), steps=[1, 2, 2.5, 5, 10], integer=True)
    ticks = [tick for tick in locator.tick_values(edges[0], edges[-1]) if edges[0] <= tick <= edges[-1]]
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks(ticks, labels=[f"{tick:.0f}" for tick in ticks])
    # Labels stay within the axes, since the next axes begin right behind.
    for label, tick in zip(axes.get_xticklabels(), ticks, strict=True):
        place = (tick - edges[0]) / (edges[-1] - edges[0])
        label.set_horizontalalignment("left" if place < 0.05 else "right" if place > 0.95 else "center")
    axes.set_xlabel("training step", fontsize=8.5)


def _draw_scale(page: "Axes", box: Box, look: Look) -> None:
    left, top, width, height = box
    x, y = np.linspace(left, left + width, 65), np.array([top + height, top])
    _draw_image(page, x, y, _color(look, _values_along(look, 64))[None, :], look.palette)
    right, bottom = left + width, top + height
    page.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=_FRAME, linewidth=0.8)
    for value, text in look.ticks.items():
        place = _place(look, np.array(value)).item()
        align = {0.0: "left", 1.0: "right"}.get(place, "center")
        label = _drawable(text)
        page.text(
            left + place * width, bottom + 2, label, fontsize=7.5, color=_DIM, ha=align, va="top", parse_math=False
        )


def _values_along(look: Look, number: int) -> NDArray[np.float64]:
    """Evenly spaced values from one end of the scale to the other."""
    return np.geomspace(look.low, look.high, number) if look.log else np.linspace(look.low, look.high, number)


def _hatch(axes: "Axes", x: NDArray[np.float64], y: tuple[float, float], image: NDArray[np.float64]) -> None:
    """Hatch what is below an image, if the image has holes. Holes are where nothing was measured."""
    if np.isnan(image).any():
        axes.fill_between(x[[0, -1]], *y, facecolor=_HATCHED, edgecolor=_HATCH, hatch="//////", linewidth=0, zorder=-1)


def _draw_image(
    axes: "Axes",
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    image: NDArray[np.float64],
    palette: Palette,
) -> None:
    limits = axes.axis()
    axes.pcolorfast(x, y, np.ma.masked_invalid(image), cmap=_colormap(palette), vmin=0.0, vmax=1.0)
    axes.axis(limits)


@cache
def _colormap(palette: Palette) -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", _PALETTES[palette]).with_extremes(bad=(0.0, 0.0, 0.0, 0.0), over=_RED)
