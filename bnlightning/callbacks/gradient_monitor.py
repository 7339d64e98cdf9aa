"""The callback that logs how large gradients and updates are, parameter by parameter."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from bnlightning._check import by_import_path, check_integer, check_limit, is_function_of_two
from bnlightning.callbacks._monitor import MonitorCallback
from bnlightning.callbacks._steps import logged_step, step_count, steps_taken, training_optimizers
from bnlightning.diagnosis.thresholds import make_thresholds
from bnlightning.monitors.gradients import Gradients, ParameterChoice
from bnlightning.writing.gallery import Picture
from bnlightning.writing.pictures import draw_surfaces

# Names of classes: importing the classes may need a package that is not installed.
_REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed keeps the gradients in partitions of its own, and the parameters have none",
    "FSDPStrategy": "FSDP flattens the parameters and cuts them anywhere, so that their gradients are no layer's. "
    "ModelParallelStrategy (FSDP2) keeps them apart and is supported",
}


class GradientMonitor(MonitorCallback):
    """Show how large the gradients and the updates of any LightningModule's parameters are.

    Training is bit for bit the same with and without it. It samples one step out of ``every_n_steps`` of each
    optimizer. Optimizers that are due within the same training batch make one sample. It sees the gradient that the
    step is for: accumulated over micro-batches, reduced over ranks and unscaled. It is **before gradient clipping** by
    Lightning, which comes after ``on_before_optimizer_step``.

    **Logged metrics**, where ``self.log`` puts the values of that training batch. ``<param>`` is the path of a
    parameter in the LightningModule, without what ``torch.compile`` or another wrapper adds. A parameter has ``n``
    values and the gradient ``g``. Its weights are ``w0`` just before the step, and ``w1`` at the end of the batch.

    - ``param_grad_norm/<param>``: ``||g||``, the 2-norm.
    - ``param_grad_rms/<param>``: ``||g|| / sqrt(n)``, comparable between parameters of different sizes.
    - ``param_grad_hist/<param>``: histogram of the finite values (TensorBoard and Weights & Biases). Far outliers are
      counted in the outermost bin.
    - ``param_grad_nonfinite/<param>``: share of NaN and infinities, only where there are any.
    - ``param_update_ratio/<param>``: ``||w1 - w0|| / ||w0||``. Momentum, weight decay and clipping are in it. About
      1e-3 is healthy. Not written where ``||w0||`` is zero.
    - ``health/grad_norm``: the norm of all values together.
    - ``health/grad_norm_ratio``: largest over smallest norm among the layers' weights. These are the parameters of two
      and more dimensions. Norms of zero are left out.
    - ``health/grad_zero``: share of these weights whose gradient is zero everywhere.
    - ``health/grad_nonfinite``: share of the parameters whose gradient holds a NaN or an infinity.
    - ``health/update_ratio``: the ratio of the norms over all parameters together.
    - ``health/gradients_by_step``, a picture: gradient and update of every weight at every sampled step. A gradient is
      shown beside that of the last weight, so that vanishing and exploding ones are seen. Drawn after the second
      sample, at the end of the epochs 1, 2, 4, 8, ..., and when the fit ends.
    - ``health/warnings``, a text: the warnings of all monitors, newest first.

    The numbers under ``health/`` are over all parameters that have a gradient at the step, chosen or not. A number that
    is not finite is not written. In a run that diverges, the norms end and the shares of non-finite values rise.

    Gradients of float64 are taken as they are, all others as float32, and a complex number as two values. A sparse
    gradient has the values that it stores, duplicates summed. A shared parameter stands under its first path. If a step
    evaluates its closure repeatedly (LBFGS), the first evaluation counts. If a parameter is stepped several times
    within a batch, the last step counts.

    Under manual optimisation, steps of an optimizer that Lightning does not wrap count as any other.

    The numbers under ``health/`` are in ``trainer.callback_metrics``, on all ranks.

    A sampled step holds one more copy of the stepped weights until the end of the batch, and 32 KiB for each histogram.
    With several ranks each computes by itself, without communication, since all of them step with the same gradients.
    DTensors (``ModelParallelStrategy``, FSDP2) are added up over the ranks in three collectives.

    Args:
        every_n_steps: Distance between two sampled steps, in optimizer steps.
        parameters: The parameters that get tags of their own: a pattern of paths such as ``"net.*.weight"``, a list of
            patterns, or a function. The function takes path and parameter, and returns a bool. By default all that
            require a gradient.
        max_parameters: Largest number of parameters with tags of their own. The first ones are taken, and a warning
            says how many are left out.
        warn_grad_norm_ratio_above: How many times smaller or larger than the last weight's a weight's gradient norm may
            be, before there is a warning. 1000 is usual. ``None``: never.
        warn_grad_nonfinite_above: Share of NaN and infinities in a gradient above which to warn.
        warn_update_ratio_above: Value of ``param_update_ratio`` above which to warn.

    Raises:
        ValueError: If a number is below 1, a limit is below 0, or ``parameters`` is something else.
        MisconfigurationException: If a fit starts with FSDP's first version or DeepSpeed.

    Example:
        >>> import lightning
        >>> monitor = GradientMonitor(every_n_steps=100, parameters="*.weight")
        >>> trainer = lightning.Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        parameters: ParameterChoice = None,
        max_parameters: int = 200,
        *,
        warn_grad_norm_ratio_above: float | None = None,
        warn_grad_nonfinite_above: float | None = None,
        warn_update_ratio_above: float | None = None,
    ) -> None:
        check_integer("max_parameters", max_parameters, at_least=1)
        parameters = by_import_path(parameters, is_function_of_two)
        _check_parameters(parameters)
        check_limit("warn_grad_norm_ratio_above", warn_grad_norm_ratio_above)
        check_limit("warn_grad_nonfinite_above", warn_grad_nonfinite_above)
        check_limit("warn_update_ratio_above", warn_update_ratio_above)
        limits = {
            "grad_norm": warn_grad_norm_ratio_above,
            "grad_nonfinite": warn_grad_nonfinite_above,
            "update_ratio": warn_update_ratio_above,
        }
        self.parameters = parameters
        self.max_parameters = max_parameters
        self.warn_grad_norm_ratio_above = warn_grad_norm_ratio_above
        self.warn_grad_nonfinite_above = warn_grad_nonfinite_above
        self.warn_update_ratio_above = warn_update_ratio_above
        self._monitor = Gradients(parameters, max_parameters=max_parameters)
        catalogues = self._monitor.catalogues
        thresholds = make_thresholds(limits, catalogues[0].statistics, "param")
        super().__init__(every_n_steps, catalogues, "param", _PICTURES, thresholds)
        self._warned = False
        # Number of steps before the current batch. ``None`` between batches. Then, by optimizer, the number of steps
        # before the last step that was sampled in the batch.
        self._began_at: int | None = None
        self._sampled: dict[int, int] = {}
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for base in type(trainer.strategy).__mro__:
            if stage == "fit" and base.__name__ in _REFUSED:
                raise MisconfigurationException(
                    f"GradientMonitor cannot be used with {base.__name__}: {_REFUSED[base.__name__]}. Remove the "
                    "callback, or choose another strategy."
                )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start(trainer)
        if not pl_module.automatic_optimization:
            self._look_at_raw_steps(trainer)
        self._warned = False
        self._check_loggers(trainer)
        self._monitor.attach(pl_module, pl_module.device)
        self._tell_what_is_left_out()
        if not self._monitor.chosen:
            self._warn_of_nothing(
                "parameters",
                self.parameters,
                pl_module,
                "none of the parameters that require a gradient is chosen. Choose others by `parameters`, such as "
                "'*.weight'.",
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began_at, self._sampled = steps_taken(trainer), {}
        self._monitor.open(logged_step(trainer))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        self._take(trainer, optimizer)

    def _take(self, trainer: lightning.Trainer, optimizer: Optimizer) -> None:
        # A step without any gradient does nothing.
        if any(parameter.grad is not None for parameter in _stepped(optimizer)) and self._is_due(trainer, optimizer):
            self._monitor.take(_stepped(optimizer), _scale(trainer, optimizer))
            self._tell_what_is_left_out()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._began_at = None
        record = self._monitor.close()
        if record is not None:
            self._tell(trainer, record)
            self._show(trainer, record)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._draw_after_epoch(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._draw(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._draw(trainer)
        self._detach(trainer)

    def _detach(self, trainer: lightning.Trainer) -> None:
        step_count(trainer).stop(trainer)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._monitor.detach()

    def _look_at_raw_steps(self, trainer: lightning.Trainer) -> None:
        """Look at the steps before which Lightning calls no hook, since the optimizer itself takes them."""
        is_training = training_optimizers(trainer)

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            if not is_training(optimizer):
                return None
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                self._take(trainer, optimizer)
                return None

            def evaluate() -> Any:
                loss = closure()
                self._take(trainer, optimizer)
                return loss

            return args[:1], {**kwargs, "closure": evaluate}

        self._handle = register_optimizer_step_pre_hook(look)

    def __getstate__(self) -> dict[str, Any]:
        # A callback that is copied in the middle of a fit has no part in it.
        return vars(self) | {"_handle": None}

    def _arguments(self) -> dict[str, Any]:
        names = inspect.signature(GradientMonitor).parameters
        return {name: getattr(self, name) for name in names}

    def _state(self) -> dict[str, Any]:
        return {"monitor": self._monitor.state_dict(), **super()._state()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._monitor.load_state_dict(state["monitor"])

    def _forget(self) -> None:
        super()._forget()
        self._monitor.forget()

    def _is_due(self, trainer: lightning.Trainer, optimizer: Optimizer) -> bool:
        """Whether this step is sampled. In a due batch every step is, at the first call of its closure."""
        # Outside of a batch, some other hook takes the step.
        if self._began_at is None or self._sampled.get(id(optimizer)) == steps_taken(trainer):
            return False
        index = next((index for index, known in enumerate(trainer.optimizers) if known is optimizer), -1)
        is_due = self._schedule.is_due(self._began_at, index) or id(optimizer) in self._sampled
        if is_due:
            self._sampled[id(optimizer)] = steps_taken(trainer)
        return is_due

    def _tell_what_is_left_out(self) -> None:
        if self._monitor.left_out and not self._warned:
            self._warned = True
            self._warn_of_left_out(
                "max_parameters",
                len(self._monitor.chosen),
                self._monitor.left_out,
                "parameters",
                "by `parameters`, such as '*.weight'. The numbers under health/ are over all of them.",
            )


_PICTURES = (
    Picture(
        "gradients_by_step",
        partial(draw_surfaces, kind="param"),
        "The gradient and the update of every weight of two or more dimensions, at every sampled training step. The "
        "norm of the gradient is divided by that of the last weight. At most 128 steps. Healthy: white, which is "
        "measured and within the range under each scale. Orange in the first layers: their gradients vanish. Purple: "
        "they explode. Hatched was not measured.",
    ),
)


def _check_parameters(parameters: Any) -> None:
    is_patterns = isinstance(parameters, Sequence) and all(isinstance(pattern, str) for pattern in parameters)
    if parameters is not None and not is_patterns and not callable(parameters):
        raise ValueError(
            f"parameters={parameters!r} is not possible: give patterns of paths such as 'net.*.weight', or a function "
            "of the path and the parameter."
        )


def _stepped(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _scale(trainer: lightning.Trainer, optimizer: Optimizer) -> float:
    """The scale that gradients still have. Fused optimizers divide by the scale of fp16 themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # Private, but Lightning and torch ask it, too.
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
