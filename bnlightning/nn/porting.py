"""Weights of other frameworks' batch normalisation, to and from state_dicts of ours and torch's.

The arrays are one layer's. eps is not among them, and must travel, too: ``BatchNorm2d(64, convention="keras",
eps=config["epsilon"], momentum=1 - config["momentum"])``.
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
    """A layer's state_dict from its variables in Keras or TensorFlow.

    Args:
        variables: Arrays of shape ``(C,)`` by name: ``gamma``, ``beta``, ``moving_mean``, ``moving_variance``, with or
            without a scope before and a ``:0`` behind, as in ``model/bn_1/gamma:0``. Where only one of ``gamma`` (with
            ``scale=False``) and ``beta`` (``center=False``) is missing, it becomes 1 or 0; without both, the state_dict
            is that of a layer with ``affine=False``.

    Returns:
        Tensors of the arrays' dtype, copied, for ``load_state_dict``. No value is rescaled. ``num_batches_tracked``,
        which these frameworks do not count, is 0: where averages depend on it (``momentum=None``, a convention that
        debiases) the next batch would replace the statistics.

    Raises:
        ValueError: For a name that is not one of these, one given twice, or missing statistics.
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
            raise ValueError(f"variables has {name!r}: give one layer's {', '.join(_KERAS_NAMES)}, each once.")
        state[key] = _tensor(value)
    missing = [name for name in ("moving_mean", "moving_variance") if _KERAS_NAMES[name] not in state]
    if missing:
        raise ValueError(f"variables={list(variables)!r} lacks {' and '.join(missing)}: give all of the layer.")
    return _complete(state)


def to_keras(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A layer's variables in Keras or TensorFlow, by name without scope, from its state_dict; the inverse of
    :func:`from_keras`.

    Raises:
        ValueError: If ``state_dict`` is not that of one batch norm layer with running statistics.
    """
    _check_state_dict(state_dict)
    return {name: _array(state_dict[key]) for name, key in _KERAS_NAMES.items() if key in state_dict}


def from_caffe(batch_norm: Sequence[Any], scale: Sequence[Any] = (), *, momentum: float = 1e-3) -> dict[str, Tensor]:
    """A layer's state_dict from the blobs of Caffe's BatchNorm layer and of the Scale layer behind it.

    Caffe keeps ``S = fraction · S + batch`` of mean and (unbiased) variance, and the same sum of ones, by which it
    divides in evaluation (``batch_norm_layer.cpp``). From that sum the number of batches is found again, which a layer
    with ``convention="caffe"`` goes on from.

    Args:
        batch_norm: Three blobs: sum of means and sum of variances, of shape ``(C,)``, and the sum of weights, a number.
        scale: The Scale layer's blobs: none, for a layer with ``affine=False``; the scale; or scale and shift, of shape
            ``(C,)``.
        momentum: ``1 - moving_average_fraction``, above 0.

    Raises:
        ValueError: For another number of blobs, a momentum outside (0, 1), or a sum of weights that does not fit it.
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
    # As Caffe has it: without a weight the statistics are zero, whatever the sums say.
    share = 1 / total if total != 0 else 0.0
    state = {"running_mean": _tensor(batch_norm[0]) * share, "running_var": _tensor(batch_norm[1]) * share}
    for key, blob in zip(("weight", "bias"), scale, strict=False):
        state[key] = _tensor(blob)
    # total = (1 - fraction^k) / (1 - fraction); in float32 it ends at 1 / momentum, after about 17 / momentum batches.
    left = max(1 - total * momentum, 2.0**-25)
    state["num_batches_tracked"] = torch.tensor(round(math.log(left) / math.log1p(-momentum)))
    return _complete(state)


def to_caffe(state_dict: Mapping[str, Tensor], *, momentum: float = 1e-3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The blobs of Caffe's BatchNorm layer and of the Scale layer behind it; the inverse of :func:`from_caffe`.

    The statistics of a layer that has counted no batch get the weight of one.

    Raises:
        ValueError: If ``state_dict`` is not that of one batch norm layer with running statistics, or for a momentum
            outside (0, 1).
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
    """Add what a layer's state_dict has, besides: a missing half of the affine pair, and the count of batches."""
    if "weight" in state or "bias" in state:
        state.setdefault("weight", torch.ones_like(state["running_mean"]))
        state.setdefault("bias", torch.zeros_like(state["running_mean"]))
    state.setdefault("num_batches_tracked", torch.tensor(0))
    return state


def _tensor(value: Any) -> Tensor:
    return torch.tensor(np.array(value)).flatten()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()
