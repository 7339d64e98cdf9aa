"""How the figures of a comparison look: what things are called, how variants are told apart, how far axes reach."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from bnlightning.compare.names import NORMS, words_of
from bnlightning.compare.runs import HistogramAt, Run, is_higher_better, labels, run_names

Variants = Mapping[str, Sequence[Run]]
"""The runs of each variant, by :attr:`~bnlightning.compare.runs.Run.variant`."""

Array = NDArray[np.float64]

NONFINITE = "#e3001b"
"""The colour of NaN and infinity, as in TensorBoard's pictures of layers."""

NOTHING = "#d4d4d4"
"""The colour of what was not measured."""

POINTS = "#b8b8b8"
"""The colour of data points."""

WARNING = "#b00020"
"""The colour of words and digits that are to be noticed."""

# Told apart in grey, too: by lightness and by line style.
_NORM_STYLES: dict[str, tuple[str, Any]] = {
    "none": ("#c44e00", (0, (5, 2))),
    "custom": ("#08306b", "solid"),
    "torch": ("#41ab5d", (0, (1, 1))),
}
_OTHER_COLORS = ("#6a51a3", "#525252", "#a63603", "#0868ac", "#238b45", "#ce1256", "#b8860b", "#17becf")
_OTHER_LINES = ("solid", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))

_PHASES = {"train": "training", "val": "validation", "test": "test"}
_METRICS = {"acc": "accuracy"}
_PARAMETERS = {"weight_std": "standard deviation of the initial weights", "eps": "epsilon"}
_SHORT_PARAMETERS = {"weight_std": "std"}

# How many times the typical cost still has a place on the axis.
_ORDER_OF_MAGNITUDE = 30.0
# Below are zeros and underflow, above the last steps before an overflow.
_TYPICAL = (0.01, 0.99)
# To each side of the median. More of them, as in a run that overflows, would leave one colour to all others.
_DECADES = 6


def style(name: Any, names: Iterable[Any]) -> tuple[str, Any]:
    """The colour and the line style of a variant.

    Each normalisation has its own, whatever it is compared with. Other names take what is left, in their order.

    Args:
        name: The variant, or another value that tells lines apart.
        names: All that are drawn.
    """
    if name in _NORM_STYLES:
        return _NORM_STYLES[name]
    index = [other for other in names if other not in _NORM_STYLES].index(name)
    # All colours before a line style comes again with another one.
    line = _OTHER_LINES[(index + index // len(_OTHER_COLORS)) % len(_OTHER_LINES)]
    return _OTHER_COLORS[index % len(_OTHER_COLORS)], line


def metric_in_words(metric: str) -> str:
    """A metric as people call it.

    Example:
        >>> metric_in_words("val/acc")
        'validation accuracy'
    """
    group, _, name = metric.rpartition("/")
    return f"{_PHASES.get(group, group)} {_METRICS.get(name, name.replace('_', ' '))}".strip()


def parameter_in_words(parameter: str) -> str:
    """A hyperparameter as people call it.

    Example:
        >>> parameter_in_words("norm_options.eps")
        'epsilon'
    """
    last = parameter.rpartition(".")[2]
    return _PARAMETERS.get(last, last.replace("_", " "))


def short_parameter(parameter: str) -> str:
    """A hyperparameter's name for narrow places."""
    return _SHORT_PARAMETERS.get(parameter.rpartition(".")[2], parameter_in_words(parameter))


def setting_in_words(parameter: str, value: Any) -> str:
    """A hyperparameter's value as people call it. A value that needs its name has it in front.

    Example:
        >>> setting_in_words("norm", "custom"), setting_in_words("activation", "tanh"), setting_in_words("depth", 7)
        ('batch norm (ours)', 'tanh', 'depth = 7')
    """
    if parameter == "norm" and value in NORMS:
        return NORMS[value]
    return value if isinstance(value, str) and value != "none" else f"{short_parameter(parameter)} = {digits_of(value)}"


def digits_of(value: Any) -> str:
    """A float to three digits, any other value as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def legend_of(variants: Variants) -> tuple[str, dict[str, str]]:
    """A legend's title and its label for each variant.

    The title has what the variants' names begin with, the labels the rest: "batch norm (ours), depth" above "2" and
    "10", "batch norm (ours)" above "depth 2, activation tanh" and "depth 10, activation relu". There is no title if a
    label would have nothing left.

    Args:
        variants: The runs of each variant.
    """
    texts, names = labels(variants), run_names(variants)
    parts = [name.parts for name in names.values()]
    shared = 0
    while all(len(each) > shared and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    beginning, rests = parts[0][:shared], [each[shared:] for each in parts]
    settings = {name for rest in rests for name, _ in rest}
    if all(len(rest) == 1 for rest in rests) and len(settings) == 1 and "" not in settings:
        beginning = [*beginning, (settings.pop(), "")]
        rests = [[("", value)] for ((_, value),) in rests]
    short = dict(zip(variants, map(words_of, rests), strict=True))
    folder, *others = {name.folder for name in names.values()}
    if len(variants) == 1 or others or not beginning or not all(short.values()):
        return "", texts
    return f"{folder}/{words_of(beginning)}".removeprefix("/"), short


def seeds_in_words(what: str, variants: Variants) -> str:
    """The end of a title that tells what is drawn of several seeds. Empty for one seed."""
    most = max(map(len, variants.values()))
    return f" ({what} of {most} seeds)" if most > 1 else ""


def write_title(figure: Figure, title: str, what: str) -> None:
    """Write a figure's title and what it shows into its upper left corner."""
    x, y = 0.2 / figure.get_figwidth(), 1 - 0.28 / figure.get_figheight()
    figure.text(x, y, f"{title}: {what}", fontsize=13, weight="bold", va="center")


def without_math(figure: Figure) -> Figure:
    """The figure, with every ``$`` of a name as it stands. Only the numbers at axes are formulas.

    Args:
        figure: The figure, drawn.
    """
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    numbers = {id(text) for axis in axes for text in axis.findobj(Text) if text is not axis.label}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in numbers:
            text.set_parse_math(False)
    return figure


def by_values(variants: Variants, names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """The runs by the values of hyperparameters, which must tell the variants apart.

    Args:
        variants: The runs of each variant.
        names: The hyperparameters.

    Raises:
        ValueError: If two variants have the same values, or if a run lacks one of the hyperparameters.
    """
    words = labels(variants)
    found: dict[tuple[Any, ...], str] = {}
    cells: dict[tuple[Any, ...], list[Run]] = {}
    for name, runs in variants.items():
        values = tuple(runs[0].hparam(parameter) for parameter in names)
        if values in found:
            raise ValueError(
                f"the variants {words[found[values]]!r} and {words[name]!r} have the same {', '.join(names)}: this "
                "figure needs runs that differ in nothing else but the seed. Compare fewer, or name what differs."
            )
        found[values] = name
        cells[values] = list(runs)
    return cells


def in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once: numbers rising, normalisations as everywhere, everything else by name. Tuples likewise."""
    return sorted(set(values), key=_order)


def _order(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_order, value))
    if isinstance(value, Real):
        return (0, float(value), "")
    known = [*NORMS]
    return (1, known.index(value) if value in known else len(known), str(value))


def value_range(curves: Sequence[Array], metric: str) -> tuple[float, float]:
    """Limits that hold every curve. Costs are left out if they would flatten all others.

    Args:
        curves: The values of each curve.
        metric: The tag of the metric, whose name tells a cost from an accuracy.
    """
    finite = np.concatenate([np.zeros(0), *(values[np.isfinite(values)] for values in map(np.asarray, curves))])
    if not len(finite):
        return 0.0, 1.0
    low = float(finite.min())
    if is_higher_better(metric):
        return low, float(finite.max())
    typical = [np.median(values[np.isfinite(values)]) for values in curves if np.isfinite(values).mean() > 0.5]
    # From the lowest value on, so that it holds for costs of any sign.
    ceiling = low + _ORDER_OF_MAGNITUDE * (max(typical) - min(low, 0.0)) if typical else float(finite.max())
    return low, float(finite[finite <= ceiling].max(initial=low))


def set_value_limits(axes: Axes, low: float, high: float, metric: str) -> None:
    """Set limits a little beyond ``low`` and ``high``, with a logarithmic scale for costs of several magnitudes."""
    if low > 0 and high / low > 5 and not is_higher_better(metric):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        return
    margin = 0.05 * (high - low) or (0.05 if is_higher_better(metric) else 0.5)
    axes.set_ylim(low - margin, high + margin)


def histogram_range(histograms: Sequence[HistogramAt]) -> tuple[float, float]:
    """Limits for a layer's values over the steps: [-1, 1] or [0, 1] if they stay there, else nearly all of them."""
    if not histograms:
        return 0.0, 1.0
    low, high = float(min(h.edges[0] for h in histograms)), float(max(h.edges[-1] for h in histograms))
    if low >= -1 and high <= 1 and high - low > 0.5:
        return (-1.0 if low < 0 else 0.0), 1.0
    lows, highs = zip(*(quantiles(histogram, 0.005, 0.995) for histogram in histograms), strict=True)
    # The one of two middle steps that is nearer to zero: of two steps one may be typical and the other not.
    low, high = float(np.quantile(lows, 0.5, method="higher")), float(np.quantile(highs, 0.5, method="lower"))
    if 0 <= low < 0.05 * high:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def quantiles(histogram: HistogramAt, *shares: float) -> list[float]:
    """The values below which these shares of a histogram's counts are."""
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    return [float(np.interp(share * cumulative[-1], cumulative, histogram.edges)) for share in shares]


def log_range(logs: Sequence[Array]) -> tuple[float, float]:
    """Limits for logarithms on one colour scale, at least a decade: nearly all that are finite."""
    finite = np.concatenate([values[np.isfinite(values)] for values in logs])
    if not len(finite):
        return -1.0, 1.0
    middle = np.median(finite)
    low, high = np.clip(np.quantile(finite, _TYPICAL), middle - _DECADES, middle + _DECADES)
    return float(low), float(max(high, low + 1))
