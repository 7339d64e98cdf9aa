"""The grammar of tags and directories, for the code that writes them and the code that reads them.

This module imports nothing of the package, so that every room can use it.

TensorBoard sorts groups by name. What matters most therefore begins with a letter that sorts first:

| tag | holds |
|---|---|
| ``diagnosis/...`` | what is wrong, in words |
| ``health/<name>`` | one number for the whole network |
| ``layer_<statistic>/<path>`` | one number or histogram for a watched layer |
| ``norm_<statistic>/<path>`` | one number for a batch norm layer |
| ``param_<statistic>/<path>`` | one number or histogram for a parameter |
| ``train/<name>``, ``val/<name>``, ``test/<name>`` | what the LightningModule itself logs |

An evaluation has its phase before the statistic: ``layer_val_dead/net.act1``, ``health/val_dead``.
"""

import re
from dataclasses import dataclass

TRAIN, VAL, TEST = "train", "val", "test"
"""The phases: training, validation and test."""

KINDS = ("layer", "norm", "param")
"""What a number belongs to: a watched layer, a batch norm layer, or a parameter."""

PREDICTION = "val/prediction"
"""The tag of :class:`~bnlightning.PredictionMonitor`'s points."""

_TAG = re.compile(rf"({'|'.join(KINDS)})_(?:({VAL}|{TEST})_)?([^/]+)/(.+)", re.DOTALL)


@dataclass(frozen=True)
class Tag:
    """A tag taken apart.

    Args:
        kind: One of :data:`KINDS`.
        statistic: Name of the statistic, such as ``"dead"``.
        path: Path of the module or the parameter, with the number of the call behind ``#``.
        phase: ``"train"``, ``"val"`` or ``"test"``.

    Example:
        >>> str(Tag("layer", "dead", "net.act1", "val"))
        'layer_val_dead/net.act1'
    """

    kind: str
    statistic: str
    path: str
    phase: str = TRAIN

    def __str__(self) -> str:
        return f"{self.kind}_{in_phase(self.statistic, self.phase)}/{self.path}"


def parse_tag(tag: str) -> Tag | None:
    """Take a tag of a layer, a batch norm layer or a parameter apart; ``None`` for any other tag.

    Example:
        >>> parse_tag("param_grad_norm/net.0.weight")
        Tag(kind='param', statistic='grad_norm', path='net.0.weight', phase='train')
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    kind, phase, statistic, path = match.groups()
    return Tag(kind, statistic, path, phase or TRAIN)


def health_tag(name: str, phase: str = TRAIN) -> str:
    """The tag of a number for the whole network.

    Example:
        >>> health_tag("dead", "val")
        'health/val_dead'
    """
    return f"health/{in_phase(name, phase)}"


def in_phase(name: str, phase: str) -> str:
    """A statistic's name as it stands in the tags of a phase: training has no prefix."""
    return name if phase == TRAIN else f"{phase}_{name}"
