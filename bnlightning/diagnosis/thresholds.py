"""When a layer is so ill that its owner should be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_warn


@dataclass(frozen=True)
class Threshold:
    """One number of the layers and what it may be at most.

    Args:
        statistic: As in :func:`bnlightning.monitors.counting.layer_statistics.statistics`.
        argument: Of the monitor, which sets it.
        limit: The number above which there is a warning.
        meaning: What is said of the share.
        cures: What people do about it.
    """

    statistic: str
    argument: str
    limit: float
    meaning: str
    cures: str


_MEANINGS = {
    "dead": (
        "of the units are dead: zero for every one of",
        "a lower learning rate, a normalisation in front of the activation, He initialisation, or an activation with a "
        "slope on both sides (leaky_relu, elu, gelu)",
    ),
    "dormant": (
        "of the units are dormant, their mean magnitude at most tau times the layer's, over",
        "a lower learning rate, a normalisation in front of the activation, or setting these units' weights anew",
    ),
    "saturated": (
        "of the values are saturated, where the activation is flat and passes hardly any gradient, over",
        "smaller initial weights, a normalisation in front of the activation, a lower learning rate, or an activation "
        "without bounds",
    ),
}


def make_thresholds(limits: Mapping[str, float | None]) -> list[Threshold]:
    """Those that are set, by the name of their statistic."""
    return [
        Threshold(name, f"warn_{name}_above", limit, *_MEANINGS[name])
        for name, limit in limits.items()
        if limit is not None
    ]


def warn_above(
    threshold: Threshold, layers: Mapping[str, tuple[dict[str, float], int]], where: str, needed: int
) -> bool:
    """Warn once of the worst layer, if one is above the threshold.

    Args:
        threshold: The number and its limit.
        layers: By label, the statistics and the samples they are over.
        where: When that was, in words.
        needed: Samples below which a number is not believed.

    Returns:
        Whether there was something to warn of.
    """
    ill = {
        label: (values[threshold.statistic], samples)
        for label, (values, samples) in layers.items()
        if values.get(threshold.statistic, 0.0) > threshold.limit and samples >= needed
    }
    if not ill:
        return False
    worst = max(ill, key=lambda label: ill[label][0])
    share, samples = ill[worst]
    others = f" Above the limit as well: {_listed([label for label in ill if label != worst])}." if len(ill) > 1 else ""
    rank_zero_warn(
        f"ActivationMonitor({threshold.argument}={threshold.limit:g}): {share:.0%} {threshold.meaning} the last "
        f"{samples} samples of {worst} ({where}).{others} Usual cures: {threshold.cures}."
    )
    return True


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"
