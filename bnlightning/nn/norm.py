"""Normalisation layers by name."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from bnlightning._check import check_choice, check_integer
from bnlightning.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

NORM_LAYERS: dict[str, Sequence[Callable[..., nn.Module]]] = {
    "none": (nn.Identity, nn.Identity, nn.Identity),
    "custom": (BatchNorm1d, BatchNorm2d, BatchNorm3d),
    "torch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
}
"""For features, images and volumes. ``none``: the identity, so that the module paths of a network do not depend on its
normalisation; ``custom``: ours; ``torch``: torch's."""

_OURS_ALONE = ("convention", "backend", "sync", "process_group")


def get_norm_layer(norm: str, dims: int = 1, **options: Any) -> Callable[[int], nn.Module]:
    """The constructor of a normalisation layer, to be called with the number of features.

    Args:
        norm: A key of :data:`NORM_LAYERS`.
        dims: 1 for the layer behind a linear one, 2 for images, 3 for volumes.
        **options: Keyword arguments of the layer. So that one set of options serves every choice, ``none`` leaves all
            of them aside and ``torch`` those that only our layer has: ``convention``, ``backend``, ``sync``,
            ``process_group``.

    Raises:
        ValueError: For an unknown name, or for options that the layer does not know.
    """
    check_choice("norm", norm, NORM_LAYERS)
    if norm == "torch":
        options = {name: value for name, value in options.items() if name not in _OURS_ALONE}
    check_integer("dims", dims, at_least=1, at_most=3)
    layer = partial(NORM_LAYERS[norm][dims - 1], **options)
    try:
        with warnings.catch_warnings():
            # What there is to warn of, the layers themselves do.
            warnings.simplefilter("ignore")
            layer(1)
    except TypeError as error:
        raise ValueError(f"norm_options={options!r} do not fit norm={norm!r}: {error}.") from error
    return layer
