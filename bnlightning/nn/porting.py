"""Conversions between the arrays of another framework's batch norm layer and the state_dict of ours and torch's.

The functions convert one layer. The arrays do not hold eps and momentum, so give these to the layer yourself:
``BatchNorm2d(64, convention="keras", eps=config["epsilon"], momentum=1 - config["momentum"])``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnlightning._check import check_number

_KERAS_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def from_keras(variables: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a layer's state_dict, made from its variables in Keras or TensorFlow.

    Args:
        variables: Arrays of shape ``(C,)`` by name: ``gamma``, ``beta``, ``moving_mean``, ``moving_variance``. A scope
            before the name and a ``:0`` after it are allowed, as in ``model/bn_1/gamma:0``. A missing ``gamma``
            (``scale=False``) becomes 1, a missing ``beta`` (``center=False``) becomes 0. If both are missing, the
            state_dict is that of a layer with ``affine=False``.

    Returns:
        Copies of the arrays as tensors of their dtype, for ``load_state_dict``. No value is rescaled.
        ``num_batches_tracked`` is 0, because these frameworks do not count batches. Some averages depend on that count
        (``momentum=None``, a convention that debiases): there the next batch would replace the statistics.

    Raises:
        ValueError: If a name is not one of the four or is given twice, or if a statistic is missing.

    Example:
        >>> variables = {name: np.ones(3) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
        >>> layer = BatchNorm1d(3, convention="keras", eps=1e-3, momentum=0.01, dtype=torch.float64)
        >>> layer.load_state_dict(from_keras(variables))
        <All keys matched successfully>
    """
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables={type(variables).__name__} is not possible: give arrays by name, such as "
            "{variable.name: variable.numpy() for variable in layer.variables}."
        )
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        key = _KERAS_NAMES.get(name.rpartition("/")[2].removesuffix(":0"))
        if key is None or key in state:
            raise ValueError(f"variables has {name!r}: give {', '.join(_KERAS_NAMES)} of one layer, each once.")
        state[key] = _tensor(value)
    missing = [name for name in ("moving_mean", "moving_variance") if _KERAS_NAMES[name] not in state]
    if missing:
        raise ValueError(f"variables={list(variables)!r} lacks {' and '.join(missing)}: give all arrays of the layer.")
    return _complete(state)


def to_keras(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return a layer's variables in Keras or TensorFlow, made from its state_dict. The inverse of :func:`from_keras`.

    Args:
        state_dict: State of one batch norm layer with running statistics, ours or torch's.

    Returns:
        Copies of the tensors as arrays of shape ``(C,)``, by name without a scope.

    Raises:
        ValueError: If ``state_dict`` is not that of one batch norm layer with running statistics.

    Example:
        >>> sorted(to_keras(nn.BatchNorm1d(3).state_dict()))
        ['beta', 'gamma', 'moving_mean', 'moving_variance']
    """
    _check_state_dict(state_dict)
    return {name: _array(state_dict[key]) for name, key in _KERAS_NAMES.items() if key in state_dict}


def from_caffe(batch_norm: Sequence[Any], scale: Sequence[Any] = (), *, momentum: float = 1e-3) -> dict[str, Tensor]:
    """Return a layer's state_dict, made from the blobs of Caffe's BatchNorm layer and of the Scale layer after it.

    Caffe keeps the sums ``S = fraction · S + batch`` of the means, of the unbiased variances and of ones. In evaluation
    it divides the first two sums by the third (``batch_norm_layer.cpp``). The third sum also tells the number of
    batches. A layer with ``convention="caffe"`` needs that number to train on.

    Args:
        batch_norm: Three blobs of the BatchNorm layer: sum of means and sum of variances, of shape ``(C,)``, and the
            sum of weights, a number.
        scale: Blobs of the Scale layer, of shape ``(C,)``: the scale, or the scale and the shift. Empty for a layer
            with ``affine=False``.
        momentum: ``1 - moving_average_fraction``, above 0 and below 1.

    Returns:
        Tensors of the blobs' dtype, for ``load_state_dict``.

    Raises:
        ValueError: If the number of blobs is another, the momentum is not between 0 and 1, or the sum of weights does
            not fit the momentum.

    Example:
        >>> state = from_caffe([np.array([2.0]), np.array([6.0]), np.array([2.0])], momentum=0.001)
        >>> state["running_mean"].item(), state["running_var"].item()
        (1.0, 3.0)
    """
    _check_caffe_momentum(momentum)
    if len(batch_norm) != 3 or len(scale) > 2:
        raise ValueError(
            f"batch_norm has {len(batch_norm)} and scale {len(scale)} blob(s): give the three of the BatchNorm layer "
            "(mean, variance, factor) and none, one or two of the Scale layer."
        )
    total = float(np.asarray(batch_norm[2]).item())
    # A sum of float32 may end a little above 1 / momentum.
    if not 0 <= total * momentum <= 1.001:
        raise ValueError(
            f"batch_norm[2]={total:g} is not possible with momentum={momentum!r}, under which weights sum to "
            f"{1 / momentum:g} at most: give momentum=1 - moving_average_fraction."
        )
    # As in Caffe: without a weight the statistics are zero, whatever the sums say.
    share = 1 / total if total != 0 else 0.0
    state = {"running_mean": _tensor(batch_norm[0]) * share, "running_var": _tensor(batch_norm[1]) * share}
    for key, blob in zip(("weight", "bias"), scale, strict=False):
        state[key] = _tensor(blob)
    # total = (1 - fraction^k) / (1 - fraction). In float32 it reaches 1 / momentum after about 17 / momentum batches.
    left = max(1 - total * momentum, 2.0**-25)
    state["num_batches_tracked"] = torch.tensor(round(math.log(left) / math.log1p(-momentum)))
    return _complete(state)


def to_caffe(state_dict: Mapping[str, Tensor], *, momentum: float = 1e-3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the blobs of Caffe's BatchNorm layer and of the Scale layer after it. The inverse of :func:`from_caffe`.

    If the layer has counted no batch, its statistics get the weight of one batch.

    Args:
        state_dict: State of one batch norm layer with running statistics, ours or torch's.
        momentum: ``1 - moving_average_fraction``, above 0 and below 1.

    Returns:
        The three blobs of the BatchNorm layer, then those of the Scale layer. See :func:`from_caffe`.

    Raises:
        ValueError: If ``state_dict`` is not that of one batch norm layer with running statistics, or the momentum is
            not between 0 and 1.

    Example:
        >>> batch_norm, scale = to_caffe(BatchNorm1d(3, convention="caffe").state_dict())
        >>> len(batch_norm), len(scale)
        (3, 2)
    """
    _check_caffe_momentum(momentum)
    _check_state_dict(state_dict)
    batches = int(state_dict["num_batches_tracked"])
    total = -math.expm1(batches * math.log1p(-momentum)) / momentum if batches else 1.0
    mean, var = _array(state_dict["running_mean"]), _array(state_dict["running_var"])
    dtype = mean.dtype
    scale = [_array(state_dict[key]) for key in ("weight", "bias") if key in state_dict]
    return [(mean * total).astype(dtype), (var * total).astype(dtype), np.array([total], dtype)], scale


def _check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    if "running_mean" not in state_dict:
        raise ValueError(
            f"state_dict has {', '.join(list(state_dict)[:3]) or 'nothing'}: give that of one batch norm layer with "
            "running statistics, layer.state_dict()."
        )


def _check_caffe_momentum(momentum: float) -> None:
    check_number("momentum", momentum, above=0.0)
    if momentum >= 1:
        raise ValueError(f"momentum={momentum!r} is not possible: give 1 - moving_average_fraction, between 0 and 1.")


def _complete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the entries that are missing: one half of the affine pair, and the count of batches."""
    if "weight" in state or "bias" in state:
        state.setdefault("weight", torch.ones_like(state["running_mean"]))
        state.setdefault("bias", torch.zeros_like(state["running_mean"]))
    state.setdefault("num_batches_tracked", torch.tensor(0))
    return state


def _tensor(value: Any) -> Tensor:
    return torch.tensor(np.array(value)).flatten()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()
