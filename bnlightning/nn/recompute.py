"""Precise running statistics, measured over many batches with the present weights."""

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
    """Replace the running statistics by the exact mean and variance over all values of the batches in ``data``.

    Running averages lag behind the weights and see few batches. The precise statistics belong to the present weights
    (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3).

    Every batch is normalised by its own statistics on its own rank, as in training without synchronisation. Otherwise
    the model runs in the mode it is in: call ``model.eval()`` first to run without dropout. No gradient is computed.

    Means and variances are merged exactly, in float64, weighted by the number of values. They are merged over batches,
    over ranks, and over the calls of a layer that a forward pass calls several times. The running variance becomes the
    biased or the unbiased one, as the layer's convention says.

    The function works on torch's layers and on ours. Some layers stay as they are: those without running statistics,
    and those that no batch reaches.

    Args:
        module: The model. It is changed only after all batches have passed; an exception leaves it as it was.
        data: Batches.
        steps: Largest number of batches to take on each rank; by default all.
        forward: Callable that runs the model on a batch. By default ``module`` is called with a batch that is a tensor,
            with the first element of a tuple or list (the others are taken for targets), or with the items of a mapping
            as keyword arguments. Tensors are moved to the device of the statistics.
        process_group: The ranks to merge if ``torch.distributed`` is initialised; by default all. Every rank must call
            this function, even without data.

    Returns:
        The number of batches taken on this rank.

    Raises:
        ValueError: If ``module`` has no batch norm layer with running statistics, if no rank had a batch, or if
            ``data`` is a single tensor.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> recompute_statistics(net, data=[torch.randn(100, 3) for _ in range(5)])
        5
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
        raise ValueError(f"data={type(data).__name__} gave no batch: give data with at least one batch.")
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
    # Ranks may have different numbers of batches, so no rank may wait for the batch of another.
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
    """Merge every layer's moments over the ranks, in place, and return the number of batches of all ranks."""
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
        # Averages over all batches, and those of a convention that debiases, continue from this count.
        layer.num_batches_tracked.add_(batches)
