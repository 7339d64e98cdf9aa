"""What batch normalisation does with its statistics, changed over a whole model.

Every function takes a model, works at once on all of its batch norm layers, and returns a handle: ``handle.remove()``
undoes it, and so does the end of a ``with`` block::

    frozen_statistics(model)                  # from now on

    with batch_statistics(model.eval()):      # here only
        model(x)

What a function sets stays when ``model.train()`` or ``model.eval()`` is called. The layers must be ours, unless a
function says otherwise: ``swap_norm(model, "custom")`` makes them so and changes nothing else.
"""

from collections.abc import Callable
from functools import partial
from operator import is_
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
    ``with batch_statistics(net.eval()): net(x)``. Works on torch's layers and on ours.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _TorchBatchNorm)]
    kept = [(layer.running_mean, layer.running_var, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.running_mean = layer.running_var = None
        layer.track_running_stats = False

    def undo() -> None:
        for layer, (mean, var, track) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var, layer.track_running_stats = mean, var, track

    return StatisticsHandle(undo)


def running_statistics(module: nn.Module) -> StatisticsHandle:
    """Normalise by the running statistics, in training too.

    In training they are still updated, before they are used; with :func:`frozen_statistics` as well, they are not:
    that is the frozen batch norm of fine-tuning. Layers without running statistics go on with the batch's.
    """
    return _set(module, "normalize_by", "running")


def frozen_statistics(module: nn.Module) -> StatisticsHandle:
    """Leave the running statistics as they are; training still normalises by the batch's."""
    return _set(module, "frozen", True)


def batch_of_one(module: nn.Module, policy: str) -> StatisticsHandle:
    """What a layer does in training with a batch of one value per channel, whose variance is zero.

    Args:
        module: The model.
        policy: ``raise``, as torch does; ``running``: normalise this batch by the running statistics; ``skip``: do not
            normalise it, only scale and shift it. Neither of the latter two updates the running statistics.
    """
    check_choice("policy", policy, ("raise", "running", "skip"))
    return _set(module, "batch_of_one", policy)


def skip_nonfinite_batches(module: nn.Module) -> StatisticsHandle:
    """Leave a layer's running statistics alone when a batch's mean or variance is not finite in any channel.

    Under automatic mixed precision a gradient scaler skips the optimizer step of such a batch, but a layer would have
    averaged it already, and one NaN stays in a running average for ever. Nothing waits for the device.
    """
    return _wrap(module, _SkipNonFinite)


def skip_recomputed_batches(module: nn.Module) -> StatisticsHandle:
    """Do not count a batch twice under activation checkpointing, which runs the forward pass again in the backward.

    The momentum would act twice on one batch. Works with both kinds of :func:`torch.utils.checkpoint.checkpoint`.
    """
    return _wrap(module, _SkipRecomputed)


def accumulate_statistics(module: nn.Module, optimizer: torch.optim.Optimizer) -> StatisticsHandle:
    """One update of the running statistics per optimizer step, from all batches since the step before it.

    With gradient accumulation the micro-batches of a step then count as the one batch that they stand for: their means
    and variances are merged exactly, in float64. Each is still normalised by its own statistics. What is pending when
    the handle is removed is dropped.

    In Lightning, call it in ``configure_optimizers``, where model and optimizer are at hand. Lightning calls that for
    every fit: a later call for the same layers takes the place of the earlier one.

    Raises:
        ValueError: If ``optimizer`` is none, or the model has batch norm layers that are not ours.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} is not possible: give the torch.optim.Optimizer that trains the model."
        )
    for layer in _layers(module):
        layer.update_rule = _without(layer.update_rule, lambda rule: isinstance(rule, _Accumulate))
    accumulated: list[_Accumulate] = []

    def start(rule: UpdateRule | None) -> "_Accumulate":
        accumulated.append(_Accumulate(rule))
        return accumulated[-1]

    handle = _wrap(module, start)
    # After the step: a closure given to it may run the last micro-batch.
    hook = optimizer.register_step_post_hook(lambda *_: _flush(accumulated))

    def undo() -> None:
        hook.remove()
        handle.remove()

    return StatisticsHandle(undo)


def _flush(rules: list["_Accumulate"]) -> None:
    for rule in rules:
        rule.flush()


class _Rule:
    """A layer's ``update_rule``, around the one that was there before."""

    def __init__(self, inner: UpdateRule | None) -> None:
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
        # No public function tells, but torch.utils.checkpoint itself asks this one: -1 outside a backward pass.
        if torch._C._current_graph_task_id() == -1:
            super().__call__(layer, mean, var, n)


class _Accumulate(_Rule):
    def __init__(self, inner: UpdateRule | None) -> None:
        super().__init__(inner)
        self.pending: tuple[_ConventionBatchNorm, Moments] | None = None

    def __call__(self, layer: _ConventionBatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        moments = self.pending[1] if self.pending is not None else Moments(mean)
        moments.add(mean.detach(), var.detach(), n)
        self.pending = (layer, moments)

    def flush(self) -> None:
        if self.pending is not None:
            layer, moments = self.pending
            self.pending = None
            super().__call__(layer, moments.mean, moments.var, moments.n)


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


def _set(module: nn.Module, name: str, value: Any) -> StatisticsHandle:
    kept = [(layer, getattr(layer, name)) for layer in _layers(module)]
    for layer, _ in kept:
        setattr(layer, name, value)

    def undo() -> None:
        for layer, before in kept:
            setattr(layer, name, before)

    return StatisticsHandle(undo)


def _wrap(module: nn.Module, rule: Callable[[UpdateRule | None], _Rule]) -> StatisticsHandle:
    """Put a rule around the update rule of every layer; undone, those put around it later stay."""
    added: list[tuple[_ConventionBatchNorm, _Rule]] = []
    for layer in _layers(module):
        mine = rule(layer.update_rule)
        if _has(layer.update_rule, type(mine)):
            continue
        layer.update_rule = mine
        added.append((layer, mine))

    def undo() -> None:
        for layer, mine in added:
            layer.update_rule = _without(layer.update_rule, partial(is_, mine))

    return StatisticsHandle(undo)


def _has(rule: UpdateRule | None, kind: type[_Rule]) -> bool:
    return isinstance(rule, _Rule) and (isinstance(rule, kind) or _has(rule.inner, kind))


def _without(rule: UpdateRule | None, is_removed: Callable[[_Rule], bool]) -> UpdateRule | None:
    if not isinstance(rule, _Rule):
        return rule
    rule.inner = _without(rule.inner, is_removed)
    return rule.inner if is_removed(rule) else rule
