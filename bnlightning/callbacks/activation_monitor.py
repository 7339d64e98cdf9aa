"""Histograms and health of the activations, in TensorBoard."""

import weakref
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules import activation as torch_activations
from torch.nn.modules import normalization as torch_normalizations
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from bnlightning._check import check_integer
from bnlightning.callbacks._cadence import EvaluationCadence
from bnlightning.callbacks._window import ActivationWindow, LayerStatistics

ACTIVATION_TYPES: tuple[type[nn.Module], ...] = tuple(
    getattr(torch_activations, name) for name in torch_activations.__all__ if name != "MultiheadAttention"
)
NORM_TYPES: tuple[type[nn.Module], ...] = (
    _NormBase,
    *(getattr(torch_normalizations, name) for name in torch_normalizations.__all__),
)

_NEVER = torch.iinfo(torch.int64).max


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
    ``every_n_steps``, and evaluations that begin at least so many steps after the last one sampled. What is sampled is
    exact over the samples of all micro-batches and ranks.

    Logged, for every watched module by its path in the LightningModule, at the number of optimizer steps taken before
    the forward pass; with the prefix ``val_`` (or ``test_``) for an evaluation, over all its batches:

    - ``act_hist``: histogram of the finite output values (TensorBoard loggers only).
    - ``act_dead``: share of the units whose output was exactly zero for every sample (for a ReLU: that never fired).
      A unit is a channel of 4-D and 5-D output, otherwise a feature of the last dimension. A unit with a NaN or an
      infinity is not dead but broken, and counts under ``act_nonfinite``. Over one small training batch many healthy
      units seem dead: the evaluation's number is the one to trust.
    - ``act_zero``: share of exact zeros among the finite values; around one half is healthy for a ReLU.
    - ``act_saturated``: share of the finite values beyond :func:`saturation_limits`, for bounded activations.
    - ``act_nonfinite``: share of NaN and infinities among all values.
    - ``act_mean``, ``act_std``: of the finite values.
    - ``health/act_dead``, ``health/act_saturated``, ``health/act_nonfinite``: the same over all watched activations
      (``act_dead`` over all their units, the others the mean over modules); ``val_health/...`` for an evaluation.
    - ``health/first_nonfinite_layer``: as text, the first module in the order of execution that made a non-finite
      output of a finite input, at the step where that first happened; ``input`` if it came with the batch.

    Args:
        every_n_steps: Distance of two samples in optimizer steps.
        modules: What to watch: a type of modules, a pattern of module paths such as ``"net.act*"``, or several of
            these. By default all activations and normalisations that are modules of their own; activations called as
            functions cannot be seen.
        check_finite_every_n_steps: At which training steps all leaf modules, watched or not, are checked for making
            the first non-finite value. By default the sampled ones. At 1 the very first one is found, for a few
            microseconds a module and step.

    Raises:
        ValueError: If a number of steps is below 1.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[ActivationMonitor(every_n_steps=100)])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
        check_finite_every_n_steps: int | None = None,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        if check_finite_every_n_steps is not None:
            check_integer("check_finite_every_n_steps", check_finite_every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self.modules = [modules] if isinstance(modules, str | type) else list(modules) if modules is not None else None
        self.check_finite_every_n_steps = check_finite_every_n_steps or every_n_steps
        self._handles: list[RemovableHandle] = []
        self._names: list[str] = []
        self._is_activation: list[bool] = []
        self._limits: list[tuple[float, float] | None] = []
        self._window: ActivationWindow | None = None
        self._window_step = 0
        self._cadence = EvaluationCadence(every_n_steps)
        self._finite_check: _FiniteCheck | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._cadence.start(trainer.global_step)
        self._attach(pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking and self._cadence.is_due(trainer.global_step):
            self._begin_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, "val_")

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, "test_")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._window is None and step % self.every_n_steps == 0:
            self._open_window(step, pl_module.device)
        if self._finite_check is not None:
            due = step % self.check_finite_every_n_steps == 0 and not self._finite_check.reported
            self._finite_check.begin(step if due else None)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._finite_check is not None:
            self._finite_check.begin(None)
        # Under gradient accumulation the window goes on until the optimizer has stepped.
        if self._window is not None and trainer.global_step > self._window_step:
            self._publish(trainer, "")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._window is not None:
            self._publish(trainer, "")
        self._report_nonfinite(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
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
                f"ActivationMonitor(modules={self.modules!r}) finds nothing to watch in {type(pl_module).__name__}: "
                "activations called as functions are not seen; make them modules, or name others in `modules`."
            )
        self._finite_check = _FiniteCheck([name for name, _ in leaves], pl_module.device)
        for position, (name, module) in enumerate(leaves):
            hook = partial(self._observe, watched.get(name), position)
            self._handles.append(module.register_forward_hook(hook))

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
        self._handles, self._window, self._finite_check = [], None, None

    def _observe(self, watched: int | None, position: int, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of every leaf module."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if self._window is not None and watched is not None:
            with torch.no_grad():
                self._window.update(watched, output)
        if self._finite_check is not None and self._finite_check.step is not None:
            with torch.no_grad():
                self._finite_check.update(position, args, output)

    def _begin_evaluation(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._handles:
            self._attach(pl_module)
        self._open_window(trainer.global_step, pl_module.device)

    def _open_window(self, step: int, device: torch.device) -> None:
        self._window, self._window_step = ActivationWindow(self._limits, device), step

    def _publish(self, trainer: lightning.Trainer, prefix: str) -> None:
        """Reduce the window over the ranks, write it, close it."""
        window, self._window = self._window, None
        if window is None:
            return
        window.reduce()
        if trainer.is_global_zero:
            statistics = {
                name: (layer, is_activation)
                for name, layer, is_activation in zip(
                    self._names, window.statistics(), self._is_activation, strict=True
                )
                if layer is not None
            }
            _write(trainer, prefix, self._window_step, {name: layer for name, (layer, _) in statistics.items()})
            _write_health(trainer, prefix, self._window_step, [layer for layer, yes in statistics.values() if yes])
        self._report_nonfinite(trainer)

    def _report_nonfinite(self, trainer: lightning.Trainer) -> None:
        check = self._finite_check
        if check is None or check.reported:
            return
        found = check.first()
        if found is not None:
            step, name = found
            _write_text(trainer, "health/first_nonfinite_layer", name, step)


class _FiniteCheck:
    """Finds the module that made the first non-finite output of a finite input.

    Args:
        names: Of the modules, by position.
        device: Where the steps found are kept until they are read.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = [*names, "input"]
        self.step: int | None = None
        self.reported = False
        self._order: dict[int, None] = {}
        # Fit may go on after an evaluation under inference mode, whose tensors nobody may change later.
        with torch.inference_mode(False):
            self._found = torch.full((len(self.names),), _NEVER, dtype=torch.int64, device=device)
        self._previous: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._first_call = True

    def begin(self, step: int | None) -> None:
        """Check the following forward passes, as those of ``step``; ``None``: do not."""
        self.step, self._previous, self._first_call = step, None, True

    def update(self, position: int, args: tuple[Any, ...], output: Tensor) -> None:
        finite_input = self._finite_input(args, output)
        finite_output = _is_finite(output)
        if self._first_call:
            self._first_call = False
            self._record(len(self.names) - 1, ~finite_input)
        self._order.setdefault(position)
        self._record(position, finite_input & ~finite_output)
        self._previous = weakref.ref(output), finite_output

    def _finite_input(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # In a chain the input is the output before it, whose answer is known (and which may be overwritten by now).
        if self._previous is not None and args and self._previous[0]() is args[0]:
            return self._previous[1]
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point() and arg is not output]
        if not tensors:
            return torch.ones((), dtype=torch.bool, device=output.device)
        return torch.stack([_is_finite(tensor) for tensor in tensors]).all()

    def _record(self, position: int, bad: Tensor) -> None:
        assert self.step is not None
        now = torch.where(bad, self.step, _NEVER)
        self._found[position] = torch.minimum(self._found[position], now)

    def first(self) -> tuple[int, str] | None:
        """The step and the name, over all ranks; every rank must call it. One answer only, then the check is over."""
        found = self._found
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        steps = found.tolist()
        step = min(steps)
        if step == _NEVER:
            return None
        self.reported = True
        in_order = [len(self.names) - 1, *self._order, *range(len(self.names) - 1)]
        return step, next(self.names[position] for position in in_order if steps[position] == step)


def _is_finite(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite, in one pass: the largest magnitude of a tensor with a NaN is NaN."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.linalg.vector_norm(x.detach(), ord=torch.inf).isfinite()


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
