r"""Batch normalisation as functions: by formulas derived by hand, and by torch's kernels.

The functions take ``input`` of shape ``(N, C)`` or ``(N, C, ...)``. They normalise every channel over its :math:`n`
values, which are those of the batch and of all trailing dimensions:

.. math::
    \mu = \frac1n \sum_i x_i \qquad
    \sigma^2 = \frac1n \sum_i (x_i - \mu)^2 \qquad
    \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} \qquad
    y_i = \gamma \hat x_i + \beta

(Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _BatchNorm(torch.autograd.Function):
    r"""Batch normalisation by the batch's own statistics, with a backward pass derived by hand.

    Write :math:`g_i = \partial L / \partial y_i` and :math:`s = (\sigma^2 + \epsilon)^{-1/2}`. The loss reaches
    :math:`\gamma` and :math:`\beta` through every :math:`y_i` of the channel:

    .. math::
        \frac{\partial L}{\partial \gamma} = \sum_i g_i \hat x_i \qquad
        \frac{\partial L}{\partial \beta} = \sum_i g_i

    It reaches :math:`x_i` on three paths.

    - Directly: :math:`\partial \hat x_j / \partial x_i = s` for :math:`j = i`.
    - Through the mean: :math:`\partial \mu / \partial x_i = 1/n` moves every :math:`\hat x_j` by :math:`-s/n`.
    - Through the variance: :math:`\partial \sigma^2 / \partial x_i = 2 (x_i - \mu) / n` scales every :math:`\hat x_j`
      by :math:`-\tfrac12 s^2`. That is a change of :math:`-s \hat x_i \hat x_j / n`. The variance also depends on the
      mean, but this adds nothing, since :math:`\sum_j (x_j - \mu) = 0`.

    The sum over :math:`j` with weights :math:`\gamma g_j` is:

    .. math::
        \frac{\partial L}{\partial x_i} = \gamma s \Big( g_i - \frac1n \sum_j g_j
            - \hat x_i \, \frac1n \sum_j g_j \hat x_j \Big)

    The backward pass keeps the input alone. One multiplication gives the normalised input again.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = reduced_dims(input)
        x = input.to(statistics_dtype(input))
        mean, centred = _centre(x, x.mean(dim=dims))
        var = centred.square().mean(dim=dims)
        scale = (var + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        output = centred * over_channels(scale, x)
        if bias is not None:
            output = output + over_channels(bias, x)
        ctx.save_for_backward(input, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return output.to(input.dtype), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, _grad_mean: None, _grad_var: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight, mean, var = ctx.saved_tensors
        dims = reduced_dims(input)
        grad = grad_output.to(mean.dtype)
        invstd = (var + ctx.eps).rsqrt()
        _, centred = _centre(input.to(mean.dtype), mean)
        normalised = centred * over_channels(invstd, grad)
        grad_bias = grad.sum(dim=dims)
        grad_weight = (grad * normalised).sum(dim=dims)
        grad_input = None
        if ctx.needs_input_grad[0]:
            n = grad.numel() // grad.shape[1]
            scale = invstd if weight is None else invstd * weight
            grad_input = grad - over_channels(grad_bias / n, grad) - normalised * over_channels(grad_weight / n, grad)
            grad_input = (grad_input * over_channels(scale, grad)).to(input.dtype)
        return (
            grad_input,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def batch_norm_reference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch's statistics, with the formulas of this module and a backward pass derived by hand.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``, of any floating dtype. Half precision is computed in
            float32.
        weight: Scale of shape ``(C,)``; ``None`` for 1.
        bias: Shift of shape ``(C,)``; ``None`` for 0.
        eps: Number added to the variance.

    Returns:
        The output, with the shape and dtype of ``input``. Then the mean and the biased variance of the batch, each of
        shape ``(C,)``, over the samples of this process alone. No gradient flows through the two statistics.

    Raises:
        ValueError: If a channel has fewer than two values.

    Example:
        >>> output, mean, var = batch_norm_reference(torch.tensor([[1.0], [3.0]]), None, None, eps=0.0)
        >>> output, mean, var
        (tensor([[-1.],
                [ 1.]]), tensor([2.]), tensor([1.]))
    """
    check_enough_values(input)
    result: tuple[Tensor, Tensor, Tensor] = _BatchNorm.apply(input, weight, bias, eps)
    return result


def batch_norm_fast(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as :func:`batch_norm_reference` by torch's own kernels.

    The result can be differentiated twice. The kernels write their statistics into running buffers. This call gives
    them new buffers and a momentum of 1, so the buffers hold the statistics of the batch (the variance unbiased). Any
    rule of averaging can follow.
    """
    n = check_enough_values(input)
    dtype = weight.dtype if weight is not None else statistics_dtype(input)
    # Zeros, because a momentum of 1 multiplies the old value by 0, and uninitialised memory may hold a NaN.
    mean = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    var = torch.zeros_like(mean)
    output = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    return output, mean, var * ((n - 1) / n)


def batch_norm_averaging(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    unbiased: bool,
    kernel: Callable[..., Tensor] = F.batch_norm,
) -> Tensor:
    """Normalise as :func:`batch_norm_fast` does, and average the statistics in place in the same call.

    This is the cheapest way. torch's kernels average the unbiased variance, and the biased one is ``(n - 1) / n`` times
    it. So a biased average is found in three steps: scale the running variance by ``n / (n - 1)``, let the kernel
    average it, scale it back.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``.
        running_mean: Tensor of shape ``(C,)``. It becomes ``(1 - momentum) * running_mean + momentum * mean``.
        running_var: Tensor of shape ``(C,)``. It becomes ``(1 - momentum) * running_var + momentum * var``.
        weight: Scale of shape ``(C,)``; ``None`` for 1.
        bias: Shift of shape ``(C,)``; ``None`` for 0.
        momentum: Weight of this batch in the running statistics, from 0 to 1.
        eps: Number added to the variance.
        unbiased: Whether the running variance averages the unbiased variance of the batch. Otherwise it averages the
            biased one.
        kernel: Function with the arguments of :func:`torch.nn.functional.batch_norm`, which is the default.

    Returns:
        The output, with the shape and dtype of ``input``.

    Raises:
        ValueError: If a channel has fewer than two values.
    """
    n = check_enough_values(input)
    if unbiased:
        return kernel(input, running_mean, running_var, weight, bias, True, momentum, eps)
    # n / (n - 1) times, as a sum, because a product with a number takes twice the time. A new tensor, because autograd
    # keeps what the kernel is given, and nothing may change that afterwards.
    scaled = torch.add(running_var, running_var, alpha=1 / (n - 1))
    output = kernel(input, running_mean, scaled, weight, bias, True, momentum, eps)
    torch.sub(scaled, scaled, alpha=1 / n, out=running_var)
    return output


def batch_norm_inference_reference(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    r"""Normalise by given statistics. Every channel then is one linear map:

    .. math::
        y_i = a x_i + (\beta - \mu a) \qquad a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    The operations come in the order of TensorFlow's ``tf.nn.batch_normalization``, and each is rounded by itself. So
    float32 results agree with TensorFlow's to the last digit. torch's kernels fuse the multiplication and the addition.

    Args:
        input: Tensor of shape ``(N, C)`` or ``(N, C, ...)``, of any floating dtype. Half precision is computed in
            float32.
        mean: Mean of shape ``(C,)``.
        var: Variance of shape ``(C,)``.
        weight: Scale of shape ``(C,)``; ``None`` for 1.
        bias: Shift of shape ``(C,)``; ``None`` for 0.
        eps: Number added to the variance.

    Returns:
        The output, with the shape and dtype of ``input``. It can be differentiated twice.
    """
    x = input.to(statistics_dtype(input))
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * over_channels(scale, x) + over_channels(shift, x)).to(input.dtype)


def batch_norm_inference_fast(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Do the same as :func:`batch_norm_inference_reference` by torch's own kernels."""
    return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


def _centre(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and ``x`` less its mean, without the error of a mean rounded to ``x``'s dtype.

    At a mean of 1000 the rounding alone is 3e-5. The difference therefore has a small mean of its own, which is
    subtracted too.
    """
    centred = x - over_channels(mean, x)
    remainder = centred.mean(dim=reduced_dims(x))
    return mean + remainder, centred - over_channels(remainder, x)


def check_enough_values(input: Tensor) -> int:
    """Return the number of values per channel; raise ``ValueError`` if there are fewer than 2."""
    n = input.numel() // max(input.shape[1], 1)
    if n < 2:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has {n} value(s) per channel, and normalising by the batch "
            "needs at least 2: use a larger batch, drop the incomplete last batch, call .eval(), or choose another "
            'policy with bnlightning.nn.batch_of_one(model, "running").'
        )
    return n


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which the statistics of ``input`` are computed: its own, or float32 for half precision."""
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype


def reduced_dims(input: Tensor) -> list[int]:
    """Return all dimensions of ``input`` except the channels'."""
    return [dim for dim in range(input.dim()) if dim != 1]


def over_channels(values: Tensor, like: Tensor) -> Tensor:
    """View ``(C,)`` as ``(1, C, 1, ...)``, to broadcast over ``like``."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
