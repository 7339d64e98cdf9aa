"""The table of normalisation layers by name, and the function that reads it."""

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
"""The layers of each name: for features, for images and for volumes.

- ``none``: the identity. It keeps the module paths of a network the same without a normalisation.
- ``custom``: our layers.
- ``torch``: torch's layers.
"""

_OURS_ALONE = ("convention", "backend", "sync", "process_group")


def get_norm_layer(norm: str, dims: int = 1, **options: Any) -> Callable[[int], nn.Module]:
    """Return the constructor of a normalisation layer.

    Args:
        norm: Name of the normalisation, a key of :data:`NORM_LAYERS`.
        dims: 1 for features, 2 for images, 3 for volumes.
        **options: Keyword arguments of the layer. One set of options serves every choice: ``none`` ignores all of them.
            ``torch`` ignores those that only our layer has: ``convention``, ``backend``, ``sync``, ``process_group``.

    Returns:
        A callable that takes the number of features and builds the layer.

    Raises:
        ValueError: If the name or an option is not known.

    Example:
        >>> norm_layer = get_norm_layer("custom", eps=1e-3, momentum=0.5)
        >>> norm_layer(30).momentum
        0.5
    """
    check_choice("norm", norm, NORM_LAYERS)
    if norm == "torch":
        options = {name: value for name, value in options.items() if name not in _OURS_ALONE}
    check_integer("dims", dims, at_least=1, at_most=3)
    layer = partial(NORM_LAYERS[norm][dims - 1], **options)
    try:
        with warnings.catch_warnings():
            # The layers warn when they are built.
            warnings.simplefilter("ignore")
            layer(1)
    except TypeError as error:
        raise ValueError(f"norm_options={options!r} do not fit norm={norm!r}: {error}.") from error
    return layer
