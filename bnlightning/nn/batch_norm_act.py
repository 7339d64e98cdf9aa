r"""Batch normalisation and the activation after it in one layer, which needs half the memory in the backward pass.

Two layers hold four tensors of the input's size at once in the backward pass, besides the input:

- the output of the activation,
- the gradient of the normalised values,
- the gradient of the input,
- a scratch of torch's kernel.

Here the activation overwrites the normalised values. Its derivative is taken from its output :math:`y = f(\hat y)`. The
gradient of the input overwrites the gradient of the normalised values
:math:`g_i = f'(\hat y_i) \, \partial L / \partial y_i`. It is linear in :math:`g_i` and :math:`x_i` (see
:mod:`bnlightning.nn.functional`):

.. math::
    \frac{\partial L}{\partial x_i} = a g_i + b x_i + c \qquad
    a = \gamma s \qquad
    b = -\frac{a s}{n} \sum_j g_j \hat x_j \qquad
    c = -\frac an \sum_j g_j - b \mu
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlightning._check import check_choice
from bnlightning.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _ConventionBatchNorm
from bnlightning.nn.functional import over_channels

_aten = torch.ops.aten

FUSED_FROM = 2**20
"""Number of input elements from which one layer is no slower than two (``benchmarks/norm.py``)."""


@dataclass(frozen=True)
class _Activation:
    """An activation that can be fused.

    Attributes:
        apply_: Applies the activation in place and returns its argument.
        backward: Returns the gradient of the input from the gradient of the output and the output.
    """

    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


FUSED_ACTIVATIONS: dict[str, _Activation] = {
    "elu": _Activation(F.elu_, lambda grad, y: _aten.elu_backward(grad, 1, 1, 1, True, y)),
    "leaky_relu": _Activation(F.leaky_relu_, lambda grad, y: _aten.leaky_relu_backward(grad, y, 0.01, True)),
    "relu": _Activation(torch.relu_, lambda grad, y: _aten.threshold_backward(grad, y, 0)),
    "sigmoid": _Activation(torch.sigmoid_, lambda grad, y: _aten.sigmoid_backward(grad, y)),
    "tanh": _Activation(torch.tanh_, lambda grad, y: _aten.tanh_backward(grad, y)),
}
"""The activations whose derivative can be told from their output, each with the defaults of torch's module."""


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        activation: str,
    ) -> Tensor:
        output, mean, invstd = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, True, momentum, eps
        )
        FUSED_ACTIVATIONS[activation].apply_(output)
        ctx.save_for_backward(input, weight, output, mean, invstd)
        ctx.eps, ctx.activation = eps, activation
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output, mean, invstd = ctx.saved_tensors
        grad = FUSED_ACTIVATIONS[ctx.activation].backward(grad_output, output)
        _, grad_weight, grad_bias = _aten.native_batch_norm_backward(
            grad, input, weight, None, None, mean, invstd, True, ctx.eps, [False, True, True]
        )
        n = input.numel() // input.shape[1]
        a = invstd if weight is None else invstd * weight
        b = -a * invstd * grad_weight / n
        c = -a * grad_bias / n - b * mean
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad.mul_(over_channels(a, grad)).addcmul_(input, over_channels(b, grad))
            grad_input.add_(over_channels(c, grad))
        return (
            grad_input,
            None,
            None,
            grad_weight if ctx.needs_input_grad[3] else None,
            grad_bias if ctx.needs_input_grad[4] else None,
            None,
            None,
            None,
        )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    activation: str,
) -> Tensor:
    """Normalise by the batch's statistics as :func:`torch.nn.functional.batch_norm` does, and apply an activation.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``, float32 or float64.
        running_mean: Tensor of shape ``(C,)``, updated in place as torch does; ``None`` for no running mean.
        running_var: Tensor of shape ``(C,)``, updated in place as torch does; ``None`` for no running variance.
        weight: Scale of shape ``(C,)``; ``None`` for 1.
        bias: Shift of shape ``(C,)``; ``None`` for 0.
        training: Must be ``True``, because evaluation has no memory to save.
        momentum: Weight of this batch in the running statistics, from 0 to 1.
        eps: Number added to the variance.
        activation: Name of the activation, a key of :data:`FUSED_ACTIVATIONS`.

    Returns:
        The output, with the shape and dtype of ``input``. It can be differentiated once.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm_act(x, None, None, None, None, True, momentum=0.1, eps=0.0, activation="relu")
        tensor([[0.],
                [1.]])
    """
    assert training
    output: Tensor = _BatchNormAct.apply(input, running_mean, running_var, weight, bias, momentum, eps, activation)
    return output


class _ActivatedBatchNorm(_ConventionBatchNorm):
    """The common part of the layers for one, two and three dimensions."""

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        check_choice("activation", activation, FUSED_ACTIVATIONS)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` as :class:`BatchNorm1d` does, and apply the activation."""
        return super().forward(input)

    def _normalize_in_parts(self, input: Tensor, n: int, updates: bool, synced: bool) -> Tensor:
        return self._activate(super()._normalize_in_parts(input, n, updates, synced))

    def _normalize_by_kernel(
        self, input: Tensor, momentum: float | None, kernel: Callable[..., Tensor] = F.batch_norm
    ) -> Tensor:
        if input.is_cpu and input.dtype in (torch.float32, torch.float64) and input.numel() >= FUSED_FROM:
            return super()._normalize_by_kernel(input, momentum, partial(batch_norm_act, activation=self.activation))
        return self._activate(super()._normalize_by_kernel(input, momentum, kernel))

    def _activate(self, output: Tensor) -> Tensor:
        activated: Tensor = getattr(F, self.activation)(output)
        return activated

    def extra_repr(self) -> str:
        """Return the arguments and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class BatchNormAct1d(_ActivatedBatchNorm, BatchNorm1d):
    """:class:`BatchNorm1d` and an activation in one layer: the same values, half the memory in the backward pass.

    The peak memory of a training step is 2 times the size of the input. ``nn.Sequential(BatchNorm1d(C), nn.ReLU())``
    needs 4 times that size (``benchmarks/norm.py``).

    The layer fuses its two parts where this was measured to be no slower. All of these must hold:

    - The training batch has at least 2**20 elements.
    - It is on a CPU, in float32 or float64.
    - The layer has ``backend="fast"`` and no ``sync``.
    - No rule of :mod:`bnlightning.nn.statistics` is in force.

    The fused layer can be differentiated once. In all other cases the layer computes what the two layers compute.

    Args:
        *args: Arguments of :class:`BatchNorm1d`.
        activation: One of ``elu``, ``leaky_relu``, ``relu``, ``sigmoid`` and ``tanh``, with torch's defaults.
        **kwargs: Keyword arguments of :class:`BatchNorm1d`.

    Raises:
        ValueError: If the activation is not known, and for the reasons of :class:`BatchNorm1d`.

    Example:
        >>> layer = BatchNormAct1d(30, activation="relu")
        >>> layer(torch.randn(10, 30)).min().item()
        0.0
    """


class BatchNormAct2d(_ActivatedBatchNorm, BatchNorm2d):
    """:class:`BatchNormAct1d` for ``(N, C, H, W)`` input.

    Example:
        >>> BatchNormAct2d(6, activation="tanh")(torch.randn(10, 6, 5, 5)).shape
        torch.Size([10, 6, 5, 5])
    """


class BatchNormAct3d(_ActivatedBatchNorm, BatchNorm3d):
    """:class:`BatchNormAct1d` for ``(N, C, D, H, W)`` input.

    Example:
        >>> BatchNormAct3d(6, activation="elu")(torch.randn(10, 6, 5, 5, 5)).shape
        torch.Size([10, 6, 5, 5, 5])
    """
