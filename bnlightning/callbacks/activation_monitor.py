"""Histograms and health of the activations, in TensorBoard."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import WarningCache, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules import activation as torch_activations
from torch.nn.modules import normalization as torch_normalizations
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from bnlightning._check import check_integer
from bnlightning.callbacks._cadence import EvaluationCadence, TrainingCadence
from bnlightning.callbacks._finite_check import FiniteCheck
from bnlightning.callbacks._window import ActivationWindow, LayerStatistics

ACTIVATION_TYPES: tuple[type[nn.Module], ...] = tuple(
    getattr(torch_activations, name) for name in torch_activations.__all__ if name != "MultiheadAttention"
)
NORM_TYPES: tuple[type[nn.Module], ...] = (
    _NormBase,
    *(getattr(torch_normalizations, name) for name in torch_normalizations.__all__),
)

_warnings = WarningCache()


def saturation_limits(module: nn.Module) -> tuple[float, float] | None:
    """The outputs beyond which an activation counts as saturated, or ``None`` for an unbounded one.

    ``-0.99`` and ``0.99`` for tanh (its slope is below 0.02 there), ``0.01`` and ``0.99`` for sigmoid (slope below
    0.01); for hardtanh, hardsigmoid and relu6 the bounds themselves count, at 0 not for relu6, where zero is rest.
    """
    if isinstance(module, nn.Tanh):
        return -0.99, 0.99
    if isinstance(module, nn.Sigmoid):
        return 0.01, 0.99
    tiny = torch.finfo(torch.float32).eps
    if isinstance(module, nn.ReLU6):
        return -torch.inf, 6.0 * (1 - tiny)
    if isinstance(module, nn.Hardtanh):
        span = (module.max_val - module.min_val) * tiny
        return module.min_val + span, module.max_val - span
    if isinstance(module, nn.Hardsigmoid):
        return tiny, 1.0 - tiny
    return None


class ActivationMonitor(Callback):
    """Show what the modules of any LightningModule put out: histograms, dead units, zeros, saturation, NaN.

    Training is bit for bit the same with and without it. It samples: all forward passes of one optimizer step out of
    ``every_n_steps``; evaluations within a fit that begin at least so many steps after the last one sampled, or with
    the final weights; every ``trainer.validate`` and ``trainer.test``. What is sampled is exact over the samples of all
    micro-batches and ranks. Several calls of one module are taken together.

    Logged, for every watched module by its path in the LightningModule, at the number of optimizer steps taken before
    the forward pass; with the prefix ``val_`` (or ``test_``) for an evaluation, over all its batches:

    - ``act_hist``: histogram of the finite output values (TensorBoard loggers only).
    - ``act_dead``: share of the units whose output was exactly zero for every sample (for a ReLU: that never fired).
      A unit is a channel of 4-D and 5-D output, otherwise an entry of the last dimension (also of ``(N, C, L)``).
      A unit with a NaN or an infinity is not dead but broken, and counts under ``act_nonfinite``. Over one small
      training batch many healthy units seem dead: the evaluation's number is the one to trust.
    - ``act_zero``: share of exact zeros among the finite values; around one half is healthy for a ReLU.
    - ``act_saturated``: share of the finite values beyond :func:`saturation_limits`, for bounded activations.
    - ``act_nonfinite``: share of NaN and infinities among all values.
    - ``act_mean``, ``act_std``: of the finite values.
    - ``health/act_dead``, ``health/act_saturated``, ``health/act_nonfinite``: the same over all watched activations
      (``act_dead`` over all their units, the others the mean over modules); ``val_health/...`` for an evaluation.
    - ``health/first_nonfinite_layer``: as text, the first module in the order of execution that put out a NaN or an
      infinity in training, at the first step checked at which one did; ``input`` if it came with the batch,
      ``before <module>`` if an operation that is no module made it.

    Args:
        every_n_steps: Distance of two samples in optimizer steps.
        modules: What to watch: a type of modules, a pattern of module paths such as ``"net.act*"``, or several of
            these. By default all activations and normalisations that are modules of their own; activations called as
            functions cannot be seen.
        check_finite_every_n_steps: At which training steps all modules without submodules, watched or not, are checked
            for non-finite output, until one is found. Only at 1, the default, it is the very first. On a CPU it costs
            ten to twenty microseconds a module and step, and 0.1 ns an element of its output.

    Raises:
        ValueError: If a number of steps is below 1, or ``modules`` holds something else.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[ActivationMonitor(every_n_steps=100)])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
        check_finite_every_n_steps: int = 1,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        check_integer("check_finite_every_n_steps", check_finite_every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self.modules = _checked_modules(modules)
        self.check_finite_every_n_steps = check_finite_every_n_steps
        self._handles: list[RemovableHandle] = []
        self._names: list[str] = []
        self._is_activation: list[bool] = []
        self._limits: list[tuple[float, float] | None] = []
        self._training = TrainingCadence(every_n_steps)
        self._evaluation = EvaluationCadence(every_n_steps)
        self._check = TrainingCadence(check_finite_every_n_steps)
        # Apart, since an evaluation may come in the middle of an accumulation of gradients.
        self._windows: dict[str, _Sample] = {}
        self._phase = ""
        self._finite_check: FiniteCheck | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._training.start()
        self._check.start()
        self._evaluation.start(trainer.global_step)
        self._attach(pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, "val_", due=self._evaluation.is_due(trainer))

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, "test_", due=True)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._end_evaluation(trainer)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._end_evaluation(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._training.is_due(step):
            self._open_window("", step, pl_module.device)
        if self._finite_check is not None and not self._finite_check.reported and self._check.is_due(step):
            self._finite_check.step = step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._finite_check is not None:
            self._finite_check.end_of_step()
        # Under gradient accumulation the window goes on until the optimizer has stepped.
        if "" in self._windows and trainer.global_step > self._windows[""].step:
            self._publish(trainer, "")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, "")
        self._report_nonfinite(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # On several ranks another one may not have failed, and would never join the reduction.
        if self._finite_check is not None and trainer.world_size == 1:
            self._finite_check.end_of_step()
            self._report_nonfinite(trainer)
        self._detach()

    def _attach(self, pl_module: lightning.LightningModule) -> None:
        """One hook on every leaf module, kept for the whole run and told by state when to look."""
        self._detach()
        self._names, self._is_activation, self._limits, watched = [], [], [], {}
        leaves = [(name, module) for name, module in pl_module.named_modules() if next(module.children(), None) is None]
        for name, module in leaves:
            if self._selects(name, module):
                watched[name] = len(self._names)
                self._names.append(name)
                self._is_activation.append(isinstance(module, ACTIVATION_TYPES))
                self._limits.append(saturation_limits(module))
        if not watched:
            rank_zero_warn(
                f"ActivationMonitor(modules={self.modules!r}) finds nothing to watch in {type(pl_module).__name__}. It "
                "watches modules without submodules, by default activations and normalisations; activations called "
                "as functions are not seen. Make them modules, or choose others by `modules`, such as 'net.*'."
            )
        self._finite_check = FiniteCheck(pl_module.device)
        for name, module in leaves:
            self._handles.append(module.register_forward_hook(partial(self._observe, name, watched.get(name))))

    def _selects(self, name: str, module: nn.Module) -> bool:
        if self.modules is None:
            return isinstance(module, (*ACTIVATION_TYPES, *NORM_TYPES))
        return any(
            fnmatchcase(name, chosen) if isinstance(chosen, str) else isinstance(module, chosen)
            for chosen in self.modules
        )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._windows, self._phase, self._finite_check = [], {}, "", None

    def _observe(self, name: str, watched: int | None, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of every leaf module."""
        sample = self._windows.get(self._phase) if watched is not None else None
        check = self._finite_check if self._finite_check is not None and self._finite_check.step is not None else None
        if (sample is None and check is None) or _is_recomputation():
            return
        if not isinstance(output, Tensor):
            if sample is not None:
                _warnings.warn(
                    f"ActivationMonitor sees nothing of {name}: it returns a {type(output).__name__}, not a tensor."
                )
            return
        if output.is_floating_point():
            with torch.no_grad():
                if sample is not None and watched is not None:
                    sample.window.update(watched, output)
                if check is not None:
                    check.update(name, args, output)

    def _begin_evaluation(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, phase: str, *, due: bool
    ) -> None:
        if due and not self._handles:
            self._attach(pl_module)
        self._phase = phase
        if due:
            self._open_window(phase, trainer.global_step, pl_module.device)

    def _end_evaluation(self, trainer: lightning.Trainer) -> None:
        phase, self._phase = self._phase, ""
        self._publish(trainer, phase)

    def _open_window(self, phase: str, step: int, device: torch.device) -> None:
        self._windows[phase] = _Sample(step, ActivationWindow(self._limits, device))

    def _publish(self, trainer: lightning.Trainer, phase: str) -> None:
        """Reduce a window over the ranks, write it, close it."""
        sample = self._windows.pop(phase, None)
        if sample is None:
            return
        sample.window.reduce()
        if trainer.is_global_zero:
            seen = [
                (name, layer, is_activation)
                for name, layer, is_activation in zip(
                    self._names, sample.window.statistics(), self._is_activation, strict=True
                )
                if layer is not None
            ]
            _write(trainer, phase, sample.step, {name: layer for name, layer, _ in seen})
            _write_health(trainer, phase, sample.step, [layer for _, layer, is_activation in seen if is_activation])
        self._report_nonfinite(trainer)

    def _report_nonfinite(self, trainer: lightning.Trainer) -> None:
        check = self._finite_check
        found = check.first() if check is not None and not check.reported else None
        if found is not None:
            step, name = found
            _write_text(trainer, "health/first_nonfinite_layer", name, step)


@dataclass(frozen=True)
class _Sample:
    step: int
    window: ActivationWindow


def _checked_modules(
    modules: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None,
) -> list[str | type[nn.Module]] | None:
    if modules is None:
        return None
    chosen = [modules] if isinstance(modules, str | type) or not isinstance(modules, Sequence) else list(modules)
    for entry in chosen:
        if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise ValueError(
                f"modules={modules!r} is not possible: give types of modules or patterns of paths such as 'net.*'."
            )
    return chosen


def _is_recomputation() -> bool:
    """Whether activation checkpointing runs a forward pass again, in the middle of a backward pass."""
    # Private, and the only way to tell; torch's own FSDP asks it, too.
    current_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)
    return current_graph_task_id is not None and current_graph_task_id() != -1


def _write(trainer: lightning.Trainer, prefix: str, step: int, layers: dict[str, LayerStatistics]) -> None:
    scalars: dict[str, float] = {}
    for name, layer in layers.items():
        values = {
            "dead": layer.dead,
            "zero": layer.zero,
            "saturated": layer.saturated,
            "nonfinite": layer.nonfinite,
            "mean": layer.mean,
            "std": layer.std,
        }
        scalars |= {f"{prefix}act_{key}/{name}": value for key, value in values.items() if value is not None}
        _write_histogram(trainer, f"{prefix}act_hist/{name}", step, layer)
    _write_scalars(trainer, scalars, step)


def _write_health(trainer: lightning.Trainer, prefix: str, step: int, layers: Sequence[LayerStatistics]) -> None:
    if not layers:
        return
    units = sum(layer.units for layer in layers)
    scalars = {
        f"{prefix}health/act_dead": sum(layer.dead * layer.units for layer in layers) / units,
        f"{prefix}health/act_nonfinite": sum(layer.nonfinite for layer in layers) / len(layers),
    }
    saturated = [layer.saturated for layer in layers if layer.saturated is not None]
    if saturated:
        scalars[f"{prefix}health/act_saturated"] = sum(saturated) / len(saturated)
    _write_scalars(trainer, scalars, step)


def _write_scalars(trainer: lightning.Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def _write_histogram(trainer: lightning.Trainer, tag: str, step: int, layer: LayerStatistics) -> None:
    histogram = layer.histogram
    if histogram is None:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram_raw(
                tag,
                min=float(histogram.edges[0]),
                max=float(histogram.edges[-1]),
                num=int(histogram.counts.sum()),
                sum=histogram.sum,
                sum_squares=histogram.sum_squares,
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=histogram.counts.tolist(),
                global_step=step,
            )


@rank_zero_only
def _write_text(trainer: lightning.Trainer, tag: str, text: str, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, global_step=step)
