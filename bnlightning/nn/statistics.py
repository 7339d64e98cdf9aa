"""What batch normalisation does with its statistics, changed over a whole model.

Every function takes a model, works at once on all of its batch norm layers, and returns a handle: ``handle.remove()``
undoes it, in any order, and so does the end of a ``with`` block::

    frozen_statistics(model)                  # from now on

    with batch_statistics(model.eval()):      # here only
        model(x)

What a function sets stays when ``model.train()`` or ``model.eval()`` is called; of two that contradict each other the
later one holds. The layers must be ours, unless a function says otherwise: ``swap_norm(model, "custom")`` makes them so
and changes nothing else. A copy of a model has what the model has, but nothing accumulates for it.
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
    """Undoes what a function of this module did to a model: by :meth:`remove`, or at the end of a ``with`` block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo it; a second time does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> "StatisticsHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def batch_statistics(module: nn.Module) -> StatisticsHandle:
    """Normalise by the batch's statistics, in evaluation too, and leave the running statistics unread and unchanged.

    For an evaluation in the manner of the first tutorials on batch normalisation, which have no train/test switch:
    ``with batch_statistics(net.eval()): net(x)``. Works on torch's layers, too; those are without running statistics
    meanwhile, also in a checkpoint.
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
    """Normalise by the running statistics, in training too.

    In training they are still updated, before they are used; with :func:`frozen_statistics` as well, they are not:
    that is the frozen batch norm of fine-tuning. Layers without running statistics go on with the batch's.
    """
    return _change(_layers(module), normalize_by="running")


def frozen_statistics(module: nn.Module) -> StatisticsHandle:
    """Leave the running statistics as they are; training still normalises by the batch's."""
    return _change(_layers(module), frozen=True)


def batch_of_one(module: nn.Module, policy: str) -> StatisticsHandle:
    """What a layer does in training with a batch of one value per channel, whose variance is zero.

    Args:
        module: The model.
        policy: ``raise``, as torch does; ``running``: normalise this batch by the running statistics; ``skip``: do not
            normalise it, only scale and shift it. Neither of the latter two updates the running statistics.
    """
    check_choice("policy", policy, ("raise", "running", "skip"))
    return _change(_layers(module), batch_of_one=policy)


def skip_nonfinite_batches(module: nn.Module) -> StatisticsHandle:
    """Leave a layer's running statistics alone when a batch's mean or variance is not finite in any channel.

    Under automatic mixed precision a gradient scaler skips the optimizer step of such a batch, but a layer would have
    averaged it already, and one NaN stays in a running average for ever. Nothing waits for the device.
    """
    return _change(_layers(module), rule=_SkipNonFinite)


def skip_recomputed_batches(module: nn.Module) -> StatisticsHandle:
    """Do not count a batch twice under activation checkpointing, which runs the forward pass again in the backward.

    The momentum would act twice on one batch. Works with both kinds of :func:`torch.utils.checkpoint.checkpoint`, by
    leaving out every batch that arrives during a backward pass.
    """
    return _change(_layers(module), rule=_SkipRecomputed)


def accumulate_statistics(module: nn.Module, optimizer: torch.optim.Optimizer) -> StatisticsHandle:
    """One update of the running statistics per optimizer step, from all batches since the step before it.

    With gradient accumulation the micro-batches of a step then count as the one batch that they stand for: their means
    and variances are merged exactly, in float64. Each is still normalised by its own statistics. A batch without
    gradients updates at once, as those of :func:`torch.optim.swa_utils.update_bn` do; so use it with the checkpointing
    that is not reentrant. What is pending when the handle is removed is dropped.

    In Lightning, call it in ``configure_optimizers``, where model and optimizer are at hand. Lightning calls that for
    every fit: a later call for the same layers takes the place of the earlier one.

    Raises:
        ValueError: If ``optimizer`` is none, or the model has batch norm layers that are not ours.
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
    """Drop what :func:`accumulate_statistics` has gathered for ``layer`` since the last step."""
    rule = getattr(layer, "update_rule", None)
    while isinstance(rule, _Rule):
        if isinstance(rule, _Accumulate):
            rule.moments = None
        rule = rule.inner


class _Rule:
    """A layer's ``update_rule``, around another one."""

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
        # No public function tells, but torch.utils.checkpoint itself asks this one: -1 outside a backward pass. A
        # compiled graph is traced outside of one and leaves the buffers alone when it computes again.
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
        # A copy, or what is loaded from a file, has no optimizer whose step it could wait for.
        return _same, (self.inner,)

    def flush(self, layer: _ConventionBatchNorm) -> None:
        moments, self.moments = self.moments, None
        if moments is not None and not layer.frozen:
            super().__call__(layer, moments.mean, moments.var, moments.n)


# Whatever the order of the calls: whether a batch counts is decided batch by batch, and accumulated is what counts.
_RULES = (_Accumulate, _SkipNonFinite, _SkipRecomputed)


@dataclass(frozen=True, eq=False)
class _Change:
    """What one handle changes; its own identity is how it is found again."""

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
        # The later one of two that accumulate is the one with a living optimizer.
        layer.changes = [
            each for each in layer.changes if each.rule is not _Accumulate or change.rule is not _Accumulate
        ]
        layer.changes = [*layer.changes, change]
        _apply_changes(layer)

    def undo() -> None:
        for layer in layers:
            # It may have become another framework's meanwhile.
            if isinstance(layer, _ConventionBatchNorm):
                layer.changes = [each for each in layer.changes if each is not change]
                _apply_changes(layer)

    return StatisticsHandle(undo)


def _apply_changes(layer: _ConventionBatchNorm) -> None:
    """Make the layer's settings those of its changes."""
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
            f"module={type(module).__name__} has batch norm layers that are not ours ({', '.join(others[:3])}{more}), "
            'and this works on ours alone: call bnlightning.swap_norm(module, "custom") first, nothing else changes.'
        )
    return [layer for _, layer in named if isinstance(layer, _ConventionBatchNorm)]
