"""Precise running statistics, measured over many batches with the weights as they are."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from bnlightning._check import check_integer
from bnlightning.nn.batch_norm import _ConventionBatchNorm
from bnlightning.nn.functional import reduced_dims
from bnlightning.nn.moments import Moments, merge_over_ranks, world_size
from bnlightning.nn.statistics import batch_statistics, discard_pending_statistics


def recompute_statistics(
    module: nn.Module,
    data: Iterable[Any],
    steps: int | None = None,
    *,
    forward: Callable[[Any], Any] | None = None,
    process_group: Any = None,
) -> int:
    """Replace the running statistics by precise ones: the mean and variance over all values of ``steps`` batches.

    Running averages lag behind the weights and see few batches; these are of the weights as they are now (Wu and
    Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3). Every batch is normalised by its own statistics on its
    own rank, as in training without synchronisation; otherwise the model runs as it is, so ``model.eval()`` first
    leaves out dropout. No gradient is computed. Means and variances are merged exactly, in float64, over batches, over
    several calls of one layer in a forward pass and over ranks, weighted by the number of values. The running variance
    becomes the biased or the unbiased one, as the layer's convention has it. Works on torch's layers and on ours.
    Layers that keep no running statistics or that no batch reaches stay as they are.

    Args:
        module: The model. Nothing in it is changed before all batches have passed; an exception leaves it as found.
        data: Batches.
        steps: How many of them to take at most, on each rank; by default all.
        forward: Called with each batch; by default ``module`` is called with the batch if that is a tensor, with its
            first element if it is a tuple or a list (the rest is taken for targets), with its items as keyword
            arguments if it is a mapping; the tensors moved to the device of the statistics.
        process_group: The ranks to merge, where ``torch.distributed`` is initialised; by default all. Every rank must
            call this function, also one without data.

    Returns:
        The number of batches taken on this rank.

    Raises:
        ValueError: If ``module`` has no batch norm layer with running statistics, no rank had a batch, or ``data``
            is a single tensor.
    """
    if isinstance(data, Tensor):
        raise ValueError(f"data=Tensor of shape {tuple(data.shape)} is not possible: give batches, such as [data].")
    if steps is not None:
        check_integer("steps", steps, at_least=1)
    layers = {
        layer: Moments(layer.running_mean)
        for layer in module.modules()
        if isinstance(layer, _TorchBatchNorm) and layer.running_mean is not None
    }
    if not layers:
        raise ValueError(f"module={type(module).__name__} has no batch norm layer that keeps running statistics.")
    count = _measure(module, layers, islice(data, steps), forward)
    total = _merge_moments(list(layers.values()), count, process_group)
    if total == 0:
        raise ValueError(f"data={type(data).__name__} gave no batch: give data with one batch at least.")
    for layer, moments in layers.items():
        _write(layer, moments, total)
    return count


def _measure(
    module: nn.Module,
    layers: dict[_TorchBatchNorm, Moments],
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None,
) -> int:
    device = next(iter(layers.values())).n.device

    def add(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        input = args[0] if args else kwargs["input"]
        if input.numel():
            per_activation = isinstance(layer, _ConventionBatchNorm) and layer.convention.per_activation
            x = (input.flatten(1) if per_activation else input).double()
            var, mean = torch.var_mean(x, dim=reduced_dims(x), correction=0)
            layers[layer].add(mean, var, x.numel() // x.shape[1])

    count = 0
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    # Ranks may have different numbers of batches: none may wait for another one's.
    synced = [layer for layer in layers if isinstance(layer, _ConventionBatchNorm) and layer.sync]
    for each in synced:
        each.sync = False
    try:
        with batch_statistics(module), torch.no_grad():
            for batch in batches:
                (forward or _feeder(module, device))(batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for each in synced:
            each.sync = True
    return count


def _feeder(module: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    def to_device(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def feed(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return module(**{name: to_device(value) for name, value in batch.items()})
        return module(to_device(batch[0] if isinstance(batch, tuple | list) else batch))

    return feed


def _merge_moments(moments: list[Moments], count: int, process_group: Any) -> int:
    """Merge every layer's moments over the ranks, in place; the number of batches of all ranks."""
    if world_size(process_group) == 1:
        return count
    total = torch.tensor([count], device=moments[0].n.device)
    dist.all_reduce(total, group=process_group)
    for each in moments:
        each.n, each.mean, each.var = merge_over_ranks(each.n, each.mean, each.var, process_group)
    return int(total)


def _write(layer: _TorchBatchNorm, moments: Moments, batches: int) -> None:
    n = moments.n.item()
    if n == 0:
        return
    assert layer.running_mean is not None and layer.running_var is not None
    unbiased = not isinstance(layer, _ConventionBatchNorm) or layer.convention.unbiased
    layer.running_mean.copy_(moments.mean)
    layer.running_var.copy_(moments.var * (n / (n - 1)) if unbiased and n > 1 else moments.var)
    discard_pending_statistics(layer)
    if layer.num_batches_tracked is not None:
        # What an average over all batches, or one without the initial values, goes on from.
        layer.num_batches_tracked.add_(batches)
