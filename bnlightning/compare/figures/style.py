"""How the figures of a comparison look: how variants are told apart, what they are called, how far axes reach."""

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bnlightning.compare.runs import Run, is_higher_better

Variants = Mapping[str, Sequence[Run]]
Array = NDArray[np.float64]

# Told apart in grey, too: by lightness and by line style.
_STYLES = {
    "none": ("#c44e00", (0, (5, 2))),
    "custom": ("#08306b", "solid"),
    "torch": ("#41ab5d", (0, (1, 1))),
}
_OTHER_COLORS = ("#6a51a3", "#525252", "#a63603", "#0868ac", "#238b45", "#ce1256", "#b8860b", "#17becf")
_OTHER_LINES = ("solid", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MEANINGS = {
    "none": "without normalisation",
    "custom": "with bnlightning's batch normalisation",
    "torch": "with torch's batch normalisation",
}
_ORDER_OF_MAGNITUDE = 30.0
# As one says it.
_SETS = {"train": "training", "val": "validation", "test": "test"}
_WORDS = {"acc": "accuracy"}
_NAMES = {"weight_std": "standard deviation of the initial weights", "eps": "epsilon"}
_SHORT_NAMES = {"weight_std": "std"}
# In the order in which they are drawn.
_NORMALIZATIONS = {"none": "without batch norm", "custom": "batch norm (custom)", "torch": "batch norm (torch)"}


def in_words(metric: str) -> str:
    """A metric as one says it: of ``val/acc`` the validation accuracy."""
    group, _, name = metric.rpartition("/")
    return f"{_SETS.get(group, group)} {_WORDS.get(name, name.replace('_', ' '))}".strip()


def shared_beginning(variants: Variants) -> str:
    """What all names begin with up to the value that tells them apart: ``custom_depth-`` of two depths."""
    first = next(iter(variants))
    # The minus sign of an exponent stands behind one letter.
    beginnings = [first[: match.end()] for match in re.finditer(r"[^\W\d]{2}-", first) if len(variants) > 1]
    return max((text for text in beginnings if all(name.startswith(text) for name in variants)), key=len, default="")


def style(name: str, variants: Variants) -> tuple[str, Any]:
    """A normalisation's own color and line, whatever it is compared with; other variants take what is left."""
    if name in _STYLES:
        return _STYLES[name]
    index = [variant for variant in variants if variant not in _STYLES].index(name)
    # All colors before a line style comes again with another one.
    line = _OTHER_LINES[(index + index // len(_OTHER_COLORS)) % len(_OTHER_LINES)]
    return _OTHER_COLORS[index % len(_OTHER_COLORS)], line


def value_range(curves: Sequence[NDArray[np.float64]], metric: str) -> tuple[float, float]:
    """Limits that hold every curve; of costs less the few values that would flatten all others."""
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
    """Limits a little beyond ``low`` and ``high``; a logarithmic scale for costs of several magnitudes."""
    if low > 0 and high / low > 5 and not is_higher_better(metric):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        return
    margin = 0.05 * (high - low) or (0.05 if is_higher_better(metric) else 0.5)
    axes.set_ylim(low - margin, high + margin)


def by_values(variants: Variants, names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """The runs by the values of hyperparameters, which must tell the variants apart.

    Raises:
        ValueError: If they do not, or if a run lacks one of them.
    """
    found: dict[tuple[Any, ...], str] = {}
    cells: dict[tuple[Any, ...], list[Run]] = {}
    for name, runs in variants.items():
        values = tuple(runs[0].hparam(parameter) for parameter in names)
        if values in found:
            raise ValueError(
                f"the variants {found[values]!r} and {name!r} have the same {', '.join(names)}: this figure needs runs "
                "that differ in nothing else but the seed. Compare fewer, or name what they differ in."
            )
        found[values] = name
        cells[values] = list(runs)
    return cells


def in_order(values: Any) -> list[Any]:
    """Each value once: numbers rising, normalisations as everywhere, everything else by name; so, too, in tuples."""
    return sorted(set(values), key=_order)


def _order(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_order, value))
    if isinstance(value, Real):
        return (0, float(value), "")
    known = [*_NORMALIZATIONS]
    return (1, known.index(value) if value in known else len(known), str(value))


def look(label: Any, labels: Any) -> tuple[str, Any]:
    """Color and line style."""
    return style(str(label), {str(other): [] for other in labels})


def parameter_name(parameter: str) -> str:
    """A hyperparameter as one says it."""
    last = parameter.rpartition(".")[2]
    return _NAMES.get(last, last.replace("_", " "))


def short_name(parameter: str) -> str:
    """A hyperparameter's name for narrow places."""
    return _SHORT_NAMES.get(parameter.rpartition(".")[2], parameter_name(parameter))


def number_text(value: Any) -> str:
    """A number to three digits; any other value as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def named(parameter: str, value: Any) -> str:
    """A value that says itself what it is, such as ``tanh``, or with its name before it."""
    if parameter == "norm" and value in _NORMALIZATIONS:
        return _NORMALIZATIONS[value]
    return value if isinstance(value, str) and value != "none" else f"{short_name(parameter)} = {number_text(value)}"


def of_seeds(what: str, variants: Variants) -> str:
    """What of the seeds is drawn, if there are several."""
    most = max(map(len, variants.values()))
    return f" ({what} of {most} seeds)" if most > 1 else ""


def write_title(figure: Figure, title: str, what: str) -> None:
    """Write a figure's title and what it shows into its upper left corner."""
    x, y = 0.2 / figure.get_figwidth(), 1 - 0.28 / figure.get_figheight()
    figure.text(x, y, f"{title}: {what}", fontsize=13, weight="bold", va="center")
