"""Batch normalisation over the batches of all ranks, on any backend of ``torch.distributed``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnlightning.nn.functional import over_channels, reduced_dims, statistics_dtype
from bnlightning.nn.moments import merge_over_ranks


class _SyncBatchNorm(torch.autograd.Function):
    r"""The formulas of :mod:`bnlightning.nn.functional`, with every mean over the values of all ranks.

    The two sums of the backward pass, :math:`\sum_j g_j` and :math:`\sum_j g_j \hat x_j`, go over all ranks, too. Those
    that become the gradients of the scale and the shift stay this rank's own: the gradients of parameters are reduced
    by whoever wraps the model, as for any other layer.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input.to(statistics_dtype(input))
        origin, mean, var = _moments(x)
        n, mean, var = merge_over_ranks(x.numel() // x.shape[1], mean, var, process_group)
        # In float64, because the difference of two close means is wanted to float32 accuracy.
        shift = (origin.double() - mean).to(x.dtype)
        mean, var = mean.to(x.dtype), var.to(x.dtype)
        invstd = (var + eps).rsqrt()
        output = _normalise(x, origin, shift, invstd)
        if weight is not None:
            output = output * over_channels(weight, x)
        if bias is not None:
            output = output + over_channels(bias, x)
        ctx.save_for_backward(input, weight, origin, shift, invstd, n)
        ctx.process_group = process_group
        ctx.mark_non_differentiable(mean, var, n)
        return output.to(input.dtype), mean, var, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, *_: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        input, weight, origin, shift, invstd, n = ctx.saved_tensors
        grad = grad_output.to(origin.dtype)
        normalised = _normalise(input.to(origin.dtype), origin, shift, invstd)
        dims = reduced_dims(grad)
        grad_bias, grad_weight = grad.sum(dim=dims), (grad * normalised).sum(dim=dims)
        # Also where no gradient of the input is wanted: another rank may wait for the sums.
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums, group=ctx.process_group)
        means = sums / n.clamp(min=1).to(sums.dtype)
        scale = invstd if weight is None else invstd * weight
        grad_input = grad - over_channels(means[0], grad) - normalised * over_channels(means[1], grad)
        grad_input = grad_input * over_channels(scale, grad)
        return (
            grad_input.to(input.dtype) if ctx.needs_input_grad[0] else None,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def batch_norm_sync(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_group: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise with the statistics of the batches of all ranks of ``process_group``, by default of the world.

    Every rank must call it, also with an empty batch; batches may differ in size. One collective of 2C + 1 numbers a
    rank in the forward pass, one of 2C in the backward pass. Works on every device and backend, gloo on CPU included.

    Args:
        input: Shape ``(N, C)`` or ``(N, C, ...)``, any floating dtype; half precision is computed in float32.
        weight: Scale of shape ``(C,)``, or ``None`` for 1.
        bias: Shift of shape ``(C,)``, or ``None`` for 0.
        eps: Added to the variance.
        process_group: The ranks to take together.

    Returns:
        The output, with the shape and dtype of ``input``; the mean and the biased variance, of shape ``(C,)``, and the
        number of values per channel (float64, no dimensions), over all ranks.
    """
    return _SyncBatchNorm.apply(input, weight, bias, eps, process_group)


def moments_over_ranks(input: Tensor, process_group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, of shape ``(C,)``, and number of values per channel, of all ranks; see above."""
    x = input.to(statistics_dtype(input))
    _, mean, var = _moments(x)
    n, mean, var = merge_over_ranks(x.numel() // x.shape[1], mean, var, process_group)
    return mean.to(x.dtype), var.to(x.dtype), n


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rounded mean of this rank's values, their mean in float64 and their biased variance, of shape ``(C,)``."""
    if x.numel() == 0:
        origin = x.new_zeros(x.shape[1])
        return origin, origin.double(), origin
    origin = x.mean(dim=reduced_dims(x))
    var, remainder = torch.var_mean(x - over_channels(origin, x), dim=reduced_dims(x), correction=0)
    return origin, origin.double() + remainder.double(), var


def _normalise(x: Tensor, origin: Tensor, shift: Tensor, invstd: Tensor) -> Tensor:
    return (x - over_channels(origin, x) + over_channels(shift, x)) * over_channels(invstd, x)
