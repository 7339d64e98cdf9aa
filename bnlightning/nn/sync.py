"""Batch normalisation by the statistics of all ranks' batches, on any backend of ``torch.distributed``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnlightning.nn.functional import over_channels, reduced_dims, statistics_dtype
from bnlightning.nn.moments import merge_over_ranks


class _SyncBatchNorm(torch.autograd.Function):
    r"""The formulas of :mod:`bnlightning.nn.functional`, with every mean over the values of all ranks.

    The sums :math:`\sum_j g_j` and :math:`\sum_j g_j \hat x_j` in the gradient of the input are over all ranks too. The
    gradients of scale and shift are sums over this rank's values alone. The wrapper of the model (DDP, FSDP) reduces
    them, as it does for any other layer.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input.to(statistics_dtype(input))
        origin, mean, var = _moments(x)
        n, mean, var = merge_over_ranks(x.numel() // x.shape[1], mean, var, process_group)
        # In float64, because the difference of two close means must be accurate to float32.
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
        # Even if this rank needs no gradient of the input: another rank may wait for the sums.
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
    """Normalise by the statistics of the batches of all ranks.

    Every rank must call it, even with an empty batch. The batches may differ in size. The forward pass takes one
    collective of 2C + 1 numbers a rank, the backward pass one of 2C. It works on every device and backend, gloo on CPU
    included.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``, of any floating dtype. Half precision is computed in
            float32.
        weight: Scale of shape ``(C,)``; ``None`` for 1.
        bias: Shift of shape ``(C,)``; ``None`` for 0.
        eps: Number added to the variance.
        process_group: The ranks to take together; by default all.

    Returns:
        The output, with the shape and dtype of ``input``. Then, over all ranks: the mean and the biased variance, each
        of shape ``(C,)``, and the number of values per channel (float64, no dimensions).
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _SyncBatchNorm.apply(input, weight, bias, eps, process_group)
    return result


def moments_over_ranks(input: Tensor, process_group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the biased variance and the number of values per channel over all ranks.

    Every rank must call it, even with an empty batch. It takes one collective of 2C + 1 numbers a rank.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``, of any floating dtype.
        process_group: The ranks to take together; by default all.

    Returns:
        Mean and biased variance of shape ``(C,)``, in float32 for half precision. The number of values per channel
        (float64, no dimensions).
    """
    x = input.to(statistics_dtype(input))
    _, mean, var = _moments(x)
    n, mean, var = merge_over_ranks(x.numel() // x.shape[1], mean, var, process_group)
    return mean.to(x.dtype), var.to(x.dtype), n


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's rounded mean, its mean in float64 and its biased variance, each of shape ``(C,)``."""
    if x.numel() == 0:
        origin = x.new_zeros(x.shape[1])
        return origin, origin.double(), origin
    origin = x.mean(dim=reduced_dims(x))
    var, remainder = torch.var_mean(x - over_channels(origin, x), dim=reduced_dims(x), correction=0)
    return origin, origin.double() + remainder.double(), var


def _normalise(x: Tensor, origin: Tensor, shift: Tensor, invstd: Tensor) -> Tensor:
    return (x - over_channels(origin, x) + over_channels(shift, x)) * over_channels(invstd, x)
