"""Functions that change how all batch norm layers of a model use and update their statistics.

Every function works at once and returns a handle. ``handle.remove()`` undoes the change, and so does the end of a
``with`` block. Handles can be removed in any order::

    frozen_statistics(model)                  # from now on

    with batch_statistics(model.eval()):      # here only
        model(x)

A change stays when ``model.train()`` or ``model.eval()`` is called. If two changes contradict each other, the later one
holds. The layers must be ours, unless a function says otherwise. ``swap_norm(model, "custom")`` makes them ours and
changes nothing else. A copy of a model has the same changes, except that nothing accumulates for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from bnlightning._check import check_choice
from bnlightning.nn.batch_norm import UpdateRule, _ConventionBatchNorm
from bnlightning.nn.moments import Moments


class StatisticsHandle:
    """Undoes a change of this module: by :meth:`remove`, or at the end of a ``with`` block.

    Args:
        undo: Function that undoes the change. It is called once.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3))
        >>> handle = frozen_statistics(model)
        >>> handle.remove()
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo the change. A second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> "StatisticsHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def batch_statistics(module: nn.Module) -> StatisticsHandle:
    """Normalise by the batch's statistics in training and evaluation. The running statistics are not used or updated.

    The first tutorials on batch normalisation evaluate in this way, because they have no train/test switch. The
    function works on torch's layers too. Until the end of the change those have no running statistics, also in a
    checkpoint.

    Args:
        module: The model.

    Returns:
        A handle that undoes the change.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3)).eval()
        >>> with batch_statistics(model):
        ...     output = model(torch.randn(10, 3) + 100)
        >>> output.mean().abs().item() < 1e-4
        True
    """
    batch_norms = [layer for layer in module.modules() if isinstance(layer, _TorchBatchNorm)]
    ours = [layer for layer in batch_norms if isinstance(layer, _ConventionBatchNorm)]
    torchs = [layer for layer in batch_norms if layer not in ours and layer.running_mean is not None]
    kept = [(layer.running_mean, layer.running_var, layer.track_running_stats) for layer in torchs]
    handle = _change(ours, normalize_by="batch", frozen=True)
    for layer in torchs:
        layer.running_mean = layer.running_var = None
        layer.track_running_stats = False

    def undo() -> None:
        handle.remove()
        for layer, (mean, var, track) in zip(torchs, kept, strict=True):
            layer.running_mean, layer.running_var, layer.track_running_stats = mean, var, track

    return StatisticsHandle(undo)


def running_statistics(module: nn.Module) -> StatisticsHandle:
    """Normalise by the running statistics in training and evaluation.

    Training still updates them, before it uses them. Call :func:`frozen_statistics` as well to stop the updates: this
    is the frozen batch norm of fine-tuning. Layers without running statistics still normalise by the batch's.

    Args:
        module: The model. Its batch norm layers must be ours.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If the model has batch norm layers that are not ours.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3))
        >>> handles = running_statistics(model), frozen_statistics(model)
        >>> x = torch.randn(10, 3)
        >>> torch.equal(model.train()(x), model.eval()(x))
        True
    """
    return _change(_layers(module), normalize_by="running")


def frozen_statistics(module: nn.Module) -> StatisticsHandle:
    """Stop the updates of the running statistics. Training still normalises by the batch's statistics.

    Args:
        module: The model. Its batch norm layers must be ours.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If the model has batch norm layers that are not ours.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3))
        >>> with frozen_statistics(model):
        ...     output = model(torch.randn(10, 3))
        >>> model[0].running_mean
        tensor([0., 0., 0.])
    """
    return _change(_layers(module), frozen=True)


def batch_of_one(module: nn.Module, policy: str) -> StatisticsHandle:
    """Choose how the layers treat a training batch of one value per channel, whose variance is zero.

    Args:
        module: The model. Its batch norm layers must be ours.
        policy: One of three:

            - ``raise``: raise ``ValueError``, as torch does.
            - ``running``: normalise this batch by the running statistics, and do not update them.
            - ``skip``: only scale and shift this batch, and do not update the running statistics.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If the policy is not known, or the model has batch norm layers that are not ours.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3))
        >>> with batch_of_one(model, "running"):
        ...     model(torch.ones(1, 3)).shape
        torch.Size([1, 3])
    """
    check_choice("policy", policy, ("raise", "running", "skip"))
    return _change(_layers(module), batch_of_one=policy)


def skip_nonfinite_batches(module: nn.Module) -> StatisticsHandle:
    """Leave out batches whose mean or variance is not finite in some channel from the running statistics.

    With mixed precision a gradient scaler skips the optimizer step of such a batch. By then a layer has averaged the
    batch, and one NaN stays in a running average for ever. The check does not wait for the device.

    Args:
        module: The model. Its batch norm layers must be ours.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If the model has batch norm layers that are not ours.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3))
        >>> handle = skip_nonfinite_batches(model)
        >>> output = model(torch.full((10, 3), torch.inf))
        >>> model[0].running_mean
        tensor([0., 0., 0.])
    """
    return _change(_layers(module), rule=_SkipNonFinite)


def skip_recomputed_batches(module: nn.Module) -> StatisticsHandle:
    """Count every batch once under activation checkpointing.

    Checkpointing runs the forward pass a second time within the backward pass, so a running average would take every
    batch twice. This function leaves out every batch that arrives during a backward pass. It works with both kinds of
    :func:`torch.utils.checkpoint.checkpoint`.

    Args:
        module: The model. Its batch norm layers must be ours.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If the model has batch norm layers that are not ours.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3))
        >>> handle = skip_recomputed_batches(model)
        >>> checkpoint(model, torch.randn(10, 3), use_reentrant=False).sum().backward()
        >>> model[1].num_batches_tracked.item()
        1
    """
    return _change(_layers(module), rule=_SkipRecomputed)


def accumulate_statistics(module: nn.Module, optimizer: torch.optim.Optimizer) -> StatisticsHandle:
    """Update the running statistics once an optimizer step, from all batches since the step before.

    With gradient accumulation the micro-batches of a step then count as one batch. Their means and variances are merged
    exactly, in float64. Each micro-batch is still normalised by its own statistics.

    A batch without gradients updates at once, as the batches of :func:`torch.optim.swa_utils.update_bn` do. The first
    forward pass of reentrant checkpointing is such a batch, so use checkpointing that is not reentrant. Statistics that
    are pending when the handle is removed are dropped.

    In Lightning, call this in ``configure_optimizers``, which has model and optimizer at hand. Lightning calls that
    method in every fit. A later call for the same layers replaces the earlier one.

    Args:
        module: The model. Its batch norm layers must be ours.
        optimizer: The optimizer that trains the model.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: If ``optimizer`` is not an optimizer, or the model has batch norm layers that are not ours.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = accumulate_statistics(model, optimizer)
        >>> for micro_batch in torch.randn(4, 10, 3):
        ...     model(micro_batch).square().mean().backward()
        >>> optimizer.step()
        >>> model[1].num_batches_tracked.item()
        1
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} is not possible: give the torch.optim.Optimizer that trains the model."
        )
    layers = _layers(module)
    handle = _change(layers, rule=_Accumulate)
    # After the step: a closure given to it may run the last micro-batch.
    hook = optimizer.register_step_post_hook(lambda *_: _flush(layers))

    def undo() -> None:
        hook.remove()
        handle.remove()

    return StatisticsHandle(undo)


def discard_pending_statistics(layer: nn.Module) -> None:
    """Drop the statistics that :func:`accumulate_statistics` has gathered for ``layer`` since the last step."""
    rule = getattr(layer, "update_rule", None)
    while isinstance(rule, _Rule):
        if isinstance(rule, _Accumulate):
            rule.moments = None
        rule = rule.inner


class _Rule:
    """An ``update_rule`` of a layer that calls another one, or the layer's own update."""

    def __init__(self, inner: UpdateRule | None = None) -> None:
        self.inner = inner

    def __call__(self, layer: _ConventionBatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        if self.inner is not None:
            self.inner(layer, mean, var, n)
        else:
            layer.update_running_stats(mean, var, n)


class _SkipNonFinite(_Rule):
    def __call__(self, layer: _ConventionBatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        finite = mean.isfinite().all() & var.isfinite().all()
        super().__call__(layer, mean, var, finite * n)


class _SkipRecomputed(_Rule):
    def __call__(self, layer: _ConventionBatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        # -1 outside a backward pass. torch.utils.checkpoint itself asks this function; there is no public one. A
        # compiled graph is traced outside a backward pass and leaves the buffers alone when it computes again.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            super().__call__(layer, mean, var, n)


class _Accumulate(_Rule):
    moments: Moments | None = None

    def __call__(self, layer: _ConventionBatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        if not torch.is_grad_enabled():
            super().__call__(layer, mean, var, n)
            return
        self.moments = self.moments or Moments(mean)
        self.moments.add(mean.detach(), var.detach(), n)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or a layer loaded from a file, has no optimizer whose step it could wait for.
        return _same, (self.inner,)

    def flush(self, layer: _ConventionBatchNorm) -> None:
        moments, self.moments = self.moments, None
        if moments is not None and not layer.frozen:
            super().__call__(layer, moments.mean, moments.var, moments.n)


# From the innermost to the outermost, in any order of the calls. The rules that leave out batches see a batch before it
# is accumulated.
_RULES = (_Accumulate, _SkipNonFinite, _SkipRecomputed)


@dataclass(frozen=True, eq=False)
class _Change:
    """The settings that one handle changes. It is compared by identity, so that its handle finds it again."""

    normalize_by: str | None = None
    frozen: bool = False
    batch_of_one: str | None = None
    rule: type[_Rule] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        rule = None if self.rule is _Accumulate else self.rule
        return _Change, (self.normalize_by, self.frozen, self.batch_of_one, rule)


def _same(value: Any) -> Any:
    return value


def _change(layers: list[_ConventionBatchNorm], **changes: Any) -> StatisticsHandle:
    change = _Change(**changes)
    for layer in layers:
        # Of two changes that accumulate, only the later one has an optimizer that still trains.
        layer.changes = [
            each for each in layer.changes if each.rule is not _Accumulate or change.rule is not _Accumulate
        ]
        layer.changes = [*layer.changes, change]
        _apply_changes(layer)

    def undo() -> None:
        for layer in layers:
            # A swap may have made it torch's layer since.
            if isinstance(layer, _ConventionBatchNorm):
                layer.changes = [each for each in layer.changes if each is not change]
                _apply_changes(layer)

    return StatisticsHandle(undo)


def _apply_changes(layer: _ConventionBatchNorm) -> None:
    """Set the layer's attributes to what its changes say together."""
    layer.normalize_by = next((each.normalize_by for each in reversed(layer.changes) if each.normalize_by), "mode")
    layer.batch_of_one = next((each.batch_of_one for each in reversed(layer.changes) if each.batch_of_one), "raise")
    layer.frozen = any(each.frozen for each in layer.changes)
    wanted = {each.rule for each in layer.changes}
    own: UpdateRule | None = layer.update_rule
    present: dict[type[_Rule], _Rule] = {}
    while isinstance(own, _Rule):
        present[type(own)] = own
        own = own.inner
    for kind in _RULES:
        if kind in wanted:
            rule = present.get(kind) or kind()
            rule.inner = own
            own = rule
    layer.update_rule = own


def _flush(layers: list[_ConventionBatchNorm]) -> None:
    for layer in layers:
        rule = layer.update_rule if isinstance(layer, _ConventionBatchNorm) else None
        while isinstance(rule, _Rule):
            if isinstance(rule, _Accumulate):
                rule.flush(layer)
            rule = rule.inner


def _layers(module: nn.Module) -> list[_ConventionBatchNorm]:
    named = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _TorchBatchNorm)]
    others = [name or "the module itself" for name, layer in named if not isinstance(layer, _ConventionBatchNorm)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"module={type(module).__name__} has batch norm layers that are not ours ({', '.join(others[:3])}{more}). "
            'Call bnlightning.swap_norm(module, "custom") first: it makes them ours and changes nothing else.'
        )
    return [layer for _, layer in named if isinstance(layer, _ConventionBatchNorm)]
