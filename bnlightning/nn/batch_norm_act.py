r"""Batch normalisation and the activation behind it in one, with a backward pass that needs half the memory.

Two layers hold four tensors of the input's size at once in the backward pass, besides the input: the activation's
output, the gradient behind the normalisation, the gradient of the input, and a scratch of torch's kernel. Here the
activation overwrites the normalised values, its derivative is taken from its output :math:`y = f(\hat y)`, and the
gradient of the input is written where the gradient behind the normalisation stood. With
:math:`g_i = f'(\hat y_i) \, \partial L / \partial y_i` it is linear in :math:`g_i` and :math:`x_i`
(see :mod:`bnlightning.nn.functional`):

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
"""Number of elements from which one layer takes no longer than two (``benchmarks/norm.py``)."""


@dataclass(frozen=True)
class _Activation:
    """An activation in place, and the gradient before it from the gradient behind it and its own output."""

    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


FUSED_ACTIVATIONS: dict[str, _Activation] = {
    "elu": _Activation(F.elu_, lambda grad, y: _aten.elu_backward(grad, 1, 1, 1, True, y)),
    "leaky_relu": _Activation(F.leaky_relu_, lambda grad, y: _aten.leaky_relu_backward(grad, y, 0.01, True)),
    "relu": _Activation(torch.relu_, lambda grad, y: _aten.threshold_backward(grad, y, 0)),
    "sigmoid": _Activation(torch.sigmoid_, lambda grad, y: _aten.sigmoid_backward(grad, y)),
    "tanh": _Activation(torch.tanh_, lambda grad, y: _aten.tanh_backward(grad, y)),
}
"""The activations whose derivative their output tells, each as torch's module has it by default."""


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
    """:func:`torch.nn.functional.batch_norm` with the statistics of the batch, and an activation behind it.

    Args:
        input: Shape ``(N, C)`` or ``(N, C, ...)``, float32 or float64.
        running_mean: Shape ``(C,)``, or ``None``; updated in place, as torch does.
        running_var: Likewise.
        weight: Scale of shape ``(C,)``, or ``None`` for 1.
        bias: Shift of shape ``(C,)``, or ``None`` for 0.
        training: ``True``: there is nothing to save in evaluation.
        momentum: Weight of this batch in the running statistics.
        eps: Added to the variance.
        activation: A key of :data:`FUSED_ACTIVATIONS`.

    Returns:
        The output, with the shape and dtype of ``input``. It can be differentiated once.
    """
    assert training
    return _BatchNormAct.apply(input, running_mean, running_var, weight, bias, momentum, eps, activation)


class _ActivatedBatchNorm(_ConventionBatchNorm):
    """What the layers of one, two and three dimensions share."""

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        check_choice("activation", activation, FUSED_ACTIVATIONS)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` as :class:`BatchNorm1d` does, and activate it."""
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
        return getattr(F, self.activation)(output)

    def extra_repr(self) -> str:
        """The arguments, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class BatchNormAct1d(_ActivatedBatchNorm, BatchNorm1d):
    """:class:`BatchNorm1d` and an activation in one layer: the same values, half the memory in the backward pass.

    Beside ``nn.Sequential(BatchNorm1d(C), nn.ReLU())`` the peak memory of a training step is 2 sizes of the input
    instead of 4 (``benchmarks/norm.py``). It is fused where that was measured to be no slower, for a training batch of
    a million elements and more, on a CPU, in float32 or float64, with ``backend="fast"``, without ``sync`` or a rule of
    :mod:`bnlightning.nn.statistics`, and then can be differentiated once; everywhere else it is the two layers.

    Args:
        *args: As :class:`BatchNorm1d`.
        activation: ``elu``, ``leaky_relu``, ``relu``, ``sigmoid`` or ``tanh``, each with torch's defaults.
        **kwargs: As :class:`BatchNorm1d`.

    Raises:
        ValueError: For another activation, and as :class:`BatchNorm1d`.
    """


class BatchNormAct2d(_ActivatedBatchNorm, BatchNorm2d):
    """As :class:`BatchNormAct1d`, of ``(N, C, H, W)`` input."""


class BatchNormAct3d(_ActivatedBatchNorm, BatchNorm3d):
    """As :class:`BatchNormAct1d`, of ``(N, C, D, H, W)`` input."""
