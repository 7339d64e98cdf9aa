"""The Custom Scalars tab of TensorBoard: all layers of a statistic on one chart."""

from collections.abc import Iterable
from typing import Any

from bnlightning.compare.names import TEST, TRAIN, VAL, Tag, parse_tag

_CATEGORIES = {"layer": "Layers", "norm": "Batch norm layers", "param": "Parameters"}
_PHASES = {TRAIN: "", VAL: " (validation)", TEST: " (test)"}

Chart = tuple[str, str, str]
"""A chart, told apart by kind, phase and statistic."""


def charts_of(tags: Iterable[str]) -> set[Chart]:
    """The charts that tags belong on. Tags of the whole network belong on none.

    Example:
        >>> charts_of(["layer_dead/net.act1", "layer_dead/net.act2", "health/dead"])
        {('layer', 'train', 'dead')}
    """
    found = map(parse_tag, tags)
    return {(tag.kind, tag.phase, tag.statistic) for tag in found if tag is not None}


def layout(charts: Iterable[Chart]) -> Any:
    """The layout of the tab as a ``Summary`` of TensorBoard's.

    Args:
        charts: All charts so far, since only the last layout of an event file counts.
    """
    from torch.utils.tensorboard.summary import custom_scalars

    categories: dict[str, dict[str, Any]] = {}
    for kind, phase, statistic in sorted(charts, key=lambda chart: (chart[0], chart[2], chart[1])):
        charts_of_kind = categories.setdefault(_CATEGORIES[kind], {})
        pattern = str(Tag(kind, statistic, ".*", phase))
        charts_of_kind[f"{kind}_{statistic}{_PHASES[phase]}"] = ["Multiline", [pattern]]
    return custom_scalars(categories)
