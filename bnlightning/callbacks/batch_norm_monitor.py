"""The callback that logs how far the running statistics of batch norm layers are from those of the batch."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_warn

from bnlightning._check import check_integer, check_limit
from bnlightning.callbacks._monitor import MonitorCallback
from bnlightning.callbacks._steps import logged_step, step_count, steps_taken
from bnlightning.diagnosis.thresholds import make_thresholds
from bnlightning.monitors.catching.selection import Choice, checked_choices
from bnlightning.monitors.norms import Norms
from bnlightning.writing.gallery import Picture
from bnlightning.writing.pictures import draw_surfaces


class BatchNormMonitor(MonitorCallback):
    r"""Show how far the running statistics of batch norm layers are from the statistics of the batch.

    Evaluation normalises by the running statistics, training by those of the batch. Where they are apart, a network
    that trains well evaluates badly. The monitor watches torch's layers, :class:`torch.nn.SyncBatchNorm`, lazy layers
    once they have parameters, and ours with any convention. Frozen layers and those in evaluation mode are watched,
    too. Instance norms are not batch norms.

    Training is bit for bit the same with and without it. It samples one optimizer step out of ``every_n_steps``. The
    batch statistics are exactly those of all inputs of that step put together: every call of the layer in training,
    all micro-batches, all ranks. A repeated forward pass of activation checkpointing counts once. The running
    statistics are those of rank 0 before the step. DDP copies them to all ranks.

    **Logged metrics**, where ``self.log`` puts the values of that step, for every layer by its path in the
    LightningModule. :math:`\epsilon` is the layer's ``eps``.

    - ``norm_mean_drift``: :math:`\max_c |\mu_{run} - \mu_{batch}| / \sqrt{\sigma^2_{run} + \epsilon}`, the largest
      over the channels. Evaluation would shift the normalised values by so much.
    - ``norm_var_drift``: :math:`\max_c |\log((\sigma^2_{run} + \epsilon) / (\sigma^2_{batch} + \epsilon))|`. A
      value of 0.7 is a factor of two. The variance of the batch is unbiased where the running variance is.
    - ``norm_rank_spread``: standard deviation of the ranks' own batch means, divided by
      :math:`\sqrt{\sigma^2_{batch} + \epsilon}` (biased, over all ranks). The largest over the channels. Only with
      several ranks.
    - ``norm_scale_near_zero``: share of the entries of ``weight`` below 1e-3 in magnitude, before the step.
    - ``norm_min_running_var``: smallest running variance before the step.
    - ``norm_nonfinite``: share of the channels with a NaN or an infinity in the input or in the running statistics.
      Only if there are any. The other numbers leave these channels out.
    - ``health/norm_mean_drift``, ``health/norm_var_drift``, ``health/norm_rank_spread``: the worst layer.
      ``health/norm_min_running_var``: the smallest. ``health/norm_scale_near_zero``, ``health/norm_nonfinite``: over
      the scales and the channels of all layers.

    - ``health/norms_by_step``, a picture: the numbers of every layer at every sampled training step. Drawn after the
      second sample, at the end of the epochs 1, 2, 4, 8, ..., and when the fit ends.
    - ``health/warnings``, a text: the warnings of all monitors, newest first.
    The numbers under ``health/`` are in ``trainer.callback_metrics``, on all ranks.

    A number that a layer does not have is not written. Without running statistics there is neither a drift nor a
    smallest variance. Without a scale there is no share of it. Before the first batch has replaced the initial values
    there is no drift. Drifts are never zero: the mean of n independent values is off by about :math:`1 / \sqrt n` by
    chance, and the largest of many channels by more.

    A channel takes about 100 bytes. At a sampled step, each call takes a copy of its input while it lasts. Hooks are
    attached when the fit starts. What was compiled before is compiled again (:func:`torch.compiler.reset`).

    Args:
        every_n_steps: Distance between two sampled steps, in optimizer steps.
        modules: The batch norm layers to watch: a type, a pattern of paths such as ``"layer1.*"``, a function of path
            and module, or a list of these. A layer is watched if any of them fits. By default all are. A lambda does
            not pickle.
        max_layers: Largest number of watched layers. The first ones in the order of ``named_modules`` are taken. Each
            has up to six tags.
        warn_mean_drift_above: Value of ``norm_mean_drift`` of a layer above which to warn. ``None``: never.
        warn_var_drift_above: The same for ``norm_var_drift``.
        warn_nonfinite_above: The same for ``norm_nonfinite``.

    Raises:
        ValueError: If ``every_n_steps`` or ``max_layers`` is below 1, a limit is below 0, or ``modules`` holds
            something else.

    Example:
        >>> import lightning
        >>> monitor = BatchNormMonitor(every_n_steps=100)
        >>> trainer = lightning.Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: Sequence[Choice] | Choice | None = None,
        max_layers: int = 200,
        *,
        warn_mean_drift_above: float | None = None,
        warn_var_drift_above: float | None = None,
        warn_nonfinite_above: float | None = None,
    ) -> None:
        check_integer("max_layers", max_layers, at_least=1)
        limits = {
            "mean_drift": warn_mean_drift_above,
            "var_drift": warn_var_drift_above,
            "nonfinite": warn_nonfinite_above,
        }
        for name, limit in limits.items():
            check_limit(f"warn_{name}_above", limit)
        self.modules = checked_choices(modules)
        self.max_layers = max_layers
        self.warn_mean_drift_above = warn_mean_drift_above
        self.warn_var_drift_above = warn_var_drift_above
        self.warn_nonfinite_above = warn_nonfinite_above
        self._monitor = Norms(self.modules, max_layers=max_layers)
        catalogues = self._monitor.catalogues
        thresholds = make_thresholds(limits, catalogues[0].statistics, "norm")
        super().__init__(every_n_steps, catalogues, "norm", _PICTURES, thresholds)
        # Number of optimizer steps before the sample.
        self._opened_at = 0
        self._is_first = True

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._is_first = True
        self._check_loggers(trainer)
        self._monitor.attach(pl_module, pl_module.device)
        watched, left_out = self._monitor.watched, self._monitor.left_out
        if not watched:
            is_there = "is chosen. Choose other `modules`, such as 'net.*'."
            is_there = is_there if self.modules is not None else "is there. Leave the callback out."
            self._warn_of_nothing("modules", self.modules, pl_module, f"no batch norm layer {is_there}")
        if left_out:
            cure = "by `modules`, such as 'layer1.*'."
            self._warn_of_left_out("max_layers", len(watched), left_out, "batch norm layers", cure)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Not earlier: at the start of the fit, Lightning has not yet restored the step at which it goes on.
        self._start(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = steps_taken(trainer)
        if self._schedule.is_due(step):
            self._opened_at = step
            self._monitor.open(logged_step(trainer))
        self._monitor.observe()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An evaluation may come between two micro-batches.
        self._monitor.pause()
        if self._monitor.is_open and steps_taken(trainer) > self._opened_at:
            self._publish(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._draw_after_epoch(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer)
        self._draw(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        step_count(trainer).stop(trainer)
        self._monitor.detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._draw(trainer)
        step_count(trainer).stop(trainer)
        self._monitor.detach()

    def _arguments(self) -> dict[str, Any]:
        names = inspect.signature(BatchNormMonitor).parameters
        return {name: getattr(self, name) for name in names}

    def _publish(self, trainer: lightning.Trainer) -> None:
        record = self._monitor.close()
        self._tell(trainer, record)
        if record is not None:
            self._show(trainer, record)
        # Only at the first sample: a later step may well run without these layers.
        if record is not None and self._is_first:
            self._is_first = False
            self._warn_if_nothing_ran()

    def _warn_if_nothing_ran(self) -> None:
        if self._monitor.saw_nothing:
            watched = self._monitor.watched
            rank_zero_warn(
                f"BatchNormMonitor sees no input of {watched[0]} or any other of {len(watched)} layer(s). Either none "
                "was called, or `layer.forward(x)` was, which calls no hooks. Call `layer(x)`."
            )


_PICTURES = (
    Picture(
        "norms_by_step",
        partial(draw_surfaces, kind="norm"),
        "The numbers of every batch norm layer at every sampled training step, over all ranks. At most 128 steps. "
        "Healthy: white, which is measured and within the range under each scale. Hatched was not measured.",
    ),
)
