"""How far batch norm layers are from what evaluation takes them for, in the loggers."""

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnlightning._check import check_integer
from bnlightning.callbacks._steps import logged_step
from bnlightning.compare.names import Tag, health_tag
from bnlightning.monitors.catching.compiled import is_compiled
from bnlightning.monitors.catching.hooks import NoHook, is_recomputation
from bnlightning.monitors.catching.selection import Choice, checked_choices, is_chosen, user_path
from bnlightning.monitors.counting.norms import NormAccumulators, NormCounts
from bnlightning.monitors.schedule import TrainingCadence
from bnlightning.writing.writers import Publication


class BatchNormMonitor(Callback):
    r"""Show how the batch norm layers of any LightningModule are: running against batch statistics, scales, ranks.

    Evaluation normalises by the running statistics what training normalised by the batch's. Where they are apart, a
    network that trains well is bad at evaluation. Watched are torch's layers, :class:`torch.nn.SyncBatchNorm` and lazy
    ones (once they have parameters) included, and ours, whatever the convention; frozen ones and those in evaluation
    mode, too. Instance norms are not batch norms.

    Training is bit for bit the same with and without it. It samples one optimizer step out of ``every_n_steps``. Of
    that step it takes the input of every call of a layer in training, over all micro-batches and ranks: exactly the
    mean and the variance of all these values put together (what activation checkpointing computes again counts once,
    validation does not count). The running statistics are those before the step, on rank 0, which are those that DDP
    gives to all ranks. Logged for every layer by its path in the LightningModule, at the step at which Lightning's own
    loggers put what ``training_step`` logs, with :math:`\epsilon` the layer's ``eps``:

    - ``norm_mean_drift``: :math:`\max_c |\mu_{run} - \mu_{batch}| / \sqrt{\sigma^2_{run} + \epsilon}`: the largest
      over the channels. How far evaluation would shift its normalised values.
    - ``norm_var_drift``: :math:`\max_c |\log((\sigma^2_{run} + \epsilon) / (\sigma^2_{batch} + \epsilon))|`; 0.7 is a
      factor of two. The variance of the batch is estimated as the layer's running variance is: unbiased for torch's.
    - ``norm_rank_spread``: standard deviation over the ranks of their own batch means, divided by
      :math:`\sqrt{\sigma^2_{batch} + \epsilon}` (biased, over all ranks); its maximum over the channels. Only with
      several ranks.
    - ``norm_scale_near_zero``: share of the entries of ``weight`` below 1e-3 in magnitude, before the step.
    - ``norm_min_running_var``: smallest running variance before the step.
    - ``norm_nonfinite``: share of the channels with a NaN or an infinity in the input or in the running statistics.
      Only if there are any. The other numbers leave these channels out, the two drifts and the spread by their
      input, too.
    - ``health/norm_mean_drift``, ``health/norm_var_drift``, ``health/norm_rank_spread``: the largest of all layers;
      ``health/norm_min_running_var``: the smallest; ``health/norm_scale_near_zero``: over the scales of all layers;
      ``health/norm_nonfinite``: over the channels of all layers.

    What a layer does not have is not written: no drifts and no smallest variance without running statistics, no
    share without a scale, no drifts before the first batch has replaced the initial values. Drifts are never zero: the
    mean of n independent values is off by about :math:`1 / \sqrt n` by chance, the largest of many channels by more.

    Memory: about 100 bytes a channel, and in a sampled step for the time of one call a copy of its input. Hooks are
    attached when the fit starts; what was compiled before is compiled again with them (:func:`torch.compiler.reset`).

    Args:
        every_n_steps: Distance of two samples in optimizer steps.
        modules: Which batch norm layers to watch: a pattern of module paths such as ``"layer1.*"``, a type, a function
            of the path and the module that says whether, or several of these, of which one must say so. By default all.
            (A lambda does not pickle.)
        max_layers: How many layers to watch at most, the first ones in the order of ``named_modules``. Each has up to
            six tags.

    Raises:
        ValueError: If ``every_n_steps`` or ``max_layers`` is below 1, or ``modules`` holds something else.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[BatchNormMonitor(every_n_steps=100)])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: Choice | Sequence[Choice] | None = None,
        max_layers: int = 200,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        check_integer("max_layers", max_layers, at_least=1)
        self.every_n_steps = every_n_steps
        self.modules = checked_choices(modules)
        self.max_layers = max_layers
        self._cadence = TrainingCadence(every_n_steps)
        self._handles: list[RemovableHandle] = []
        self._names: list[str] = []
        self._rows: NormAccumulators | None = None
        # Where the sample belongs: the number of optimizer steps before it, and its place on the x-axis.
        self._sample: tuple[int, int] | None = None
        self._observing = False
        self._is_first = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy, which a copy of the module in the middle of a fit brings along, has no part in that fit.
        return vars(self) | {"_handles": [], "_names": [], "_rows": None, "_sample": None, "_observing": False}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._is_first = True
        self._attach(pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # What a checkpoint or the fit before left, if this one goes on from there. (When the fit starts, Lightning has
        # not yet restored at which step.)
        if self._cadence.last is not None and self._cadence.last >= trainer.global_step:
            self._cadence.start()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rows is None:
            return
        if self._cadence.is_due(trainer.global_step):
            self._rows.start()
            self._sample = trainer.global_step, logged_step(trainer)
        self._observing = self._sample is not None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An evaluation may come between two micro-batches.
        self._observing = False
        if self._sample is not None and trainer.global_step > self._sample[0]:
            self._publish(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._sample is not None:
            self._publish(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return {"last_sampled": self._cadence.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cadence.last = state_dict["last_sampled"]

    def _attach(self, pl_module: lightning.LightningModule) -> None:
        """One hook on every layer, kept for the whole fit and told by state when to look."""
        self._detach()
        layers = {
            user_path(name): layer
            for name, layer in pl_module.named_modules()
            if isinstance(layer, _BatchNorm)
            and (self.modules is None or is_chosen(self.modules, user_path(name), layer))
        }
        if not layers:
            cure = "Leave the callback out." if self.modules is None else "Choose other `modules`, such as 'net.*'."
            rank_zero_warn(
                f"BatchNormMonitor(modules={self.modules!r}) finds nothing to watch in {type(pl_module).__name__}: no "
                f"batch norm layer {'is chosen' if self.modules is not None else 'is there'}. {cure}"
            )
            return
        if len(layers) > self.max_layers:
            rank_zero_warn(
                f"BatchNormMonitor(max_layers={self.max_layers}) watches the first {self.max_layers} of {len(layers)} "
                "batch norm layers: raise `max_layers`, or choose by `modules`, such as 'layer1.*'."
            )
        if is_compiled(pl_module):
            # What ran before would not call the hooks.
            torch.compiler.reset()
        self._names = list(layers)[: self.max_layers]
        watched = [layers[name] for name in self._names]
        self._rows = NormAccumulators(watched, pl_module.device)
        self._handles = [
            layer.register_forward_pre_hook(_Hook(self, index), with_kwargs=True) for index, layer in enumerate(watched)
        ]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._names, self._rows = [], [], None
        self._sample, self._observing = None, False

    def observe(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layer ``index`` is called."""
        if not self._observing or self._rows is None or is_recomputation():
            return
        input = args[0] if args else kwargs.get("input")
        if isinstance(input, Tensor):
            self._rows.update(index, input)

    def _publish(self, trainer: lightning.Trainer) -> None:
        assert self._rows is not None and self._sample is not None
        (_, x), self._sample = self._sample, None
        self._rows.reduce()
        if trainer.is_global_zero:
            read = zip(self._names, self._rows.statistics(), strict=True)
            layers = {name: layer for name, layer in read if layer is not None}
            self._warn_if_nothing_ran(list(layers.values()))
            Publication(x, scalars=_scalars(layers) | _health(list(layers.values()))).write(trainer)

    def _warn_if_nothing_ran(self, layers: Sequence[NormCounts]) -> None:
        # In the first sample only: later, a step may well do without them.
        first, self._is_first = self._is_first, False
        if not first or not layers or any(layer.seen for layer in layers):
            return
        rank_zero_warn(
            f"BatchNormMonitor sees no input of {self._names[0]} or any other of {len(layers)} layer(s): none was "
            "called, or `layer.forward(x)` was, which calls no hooks: call `layer(x)`."
        )


class _Hook:
    """A layer's forward pre-hook."""

    def __init__(self, monitor: BatchNormMonitor, index: int) -> None:
        self.monitor = monitor
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.monitor.observe(self.index, args, kwargs)

    def __reduce__(self) -> Any:
        return NoHook, ()


def _scalars(layers: dict[str, NormCounts]) -> dict[str, float]:
    values = {
        str(Tag("norm", key, name)): getattr(layer, key)
        for name, layer in layers.items()
        for key in ("mean_drift", "var_drift", "rank_spread", "scale_near_zero", "min_running_var")
    }
    values |= {str(Tag("norm", "nonfinite", name)): layer.nonfinite or None for name, layer in layers.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def _health(layers: Sequence[NormCounts]) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for key, worst in (("mean_drift", max), ("var_drift", max), ("rank_spread", max), ("min_running_var", min)):
        values = [value for layer in layers if (value := getattr(layer, key)) is not None]
        if values:
            scalars[health_tag(f"norm_{key}")] = worst(values)
    scales, channels = sum(layer.scales for layer in layers), sum(layer.channels for layer in layers)
    if scales:
        near_zero = sum((layer.scale_near_zero or 0.0) * layer.scales for layer in layers)
        scalars[health_tag("norm_scale_near_zero")] = near_zero / scales
    if channels:
        scalars[health_tag("norm_nonfinite")] = sum(layer.nonfinite * layer.channels for layer in layers) / channels
    return scalars
