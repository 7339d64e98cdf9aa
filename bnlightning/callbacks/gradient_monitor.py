"""How large gradients and updates are, parameter by parameter, in TensorBoard."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from bnlightning._check import check_integer
from bnlightning.callbacks._steps import logged_step
from bnlightning.compare.names import Tag, health_tag
from bnlightning.monitors.catching.selection import user_path
from bnlightning.monitors.counting.histogram import TypicalRanges
from bnlightning.monitors.counting.parameters import ParameterAccumulators, ParameterCounts
from bnlightning.monitors.counting.ranks import is_sharded
from bnlightning.monitors.schedule import TrainingCadence
from bnlightning.writing.writers import Publication

# Names of classes, since importing them may need a package that is not installed.
_REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed keeps the gradients in partitions of its own, and the parameters have none",
    "FSDPStrategy": "FSDP flattens the parameters and cuts them anywhere, so that their gradients are no layer's. "
    "ModelParallelStrategy (FSDP2) keeps them apart and is supported",
}
_LARGEST = float(np.finfo(np.float32).max)

Predicate = Callable[[str, nn.Parameter], bool]


class GradientMonitor(Callback):
    """Show how large the gradients and the updates of any LightningModule's parameters are.

    Training is bit for bit the same with and without it. It samples one step out of ``every_n_steps`` of each
    optimizer; optimizers that are due within the same training batch make one sample. What it sees is the gradient that
    the step is for: accumulated over micro-batches, reduced over ranks, unscaled (where a fused optimizer does that
    later, too), and **before any gradient clipping** by Lightning, which comes after ``on_before_optimizer_step``.

    Logged where ``self.log`` puts the values of that training batch; ``<param>`` is the path of a parameter in the
    LightningModule, without what ``torch.compile``, activation checkpointing or another wrapper adds to it. For every
    chosen parameter that has a gradient at the step, over all ``n`` values ``g`` of it:

    - ``param_grad_norm/<param>``: ``||g||``, the 2-norm.
    - ``param_grad_rms/<param>``: ``||g|| / sqrt(n)``, comparable between parameters of different sizes.
    - ``param_grad_hist/<param>``: histogram of the finite values (TensorBoard and Weights & Biases). Values far
      outside of what is typical are counted in its outermost bin.
    - ``param_grad_nonfinite/<param>``: share of NaN and infinities; only where there are any.
    - ``param_update_ratio/<param>``: ``||w1 - w0|| / ||w0||`` of the weights ``w0`` just before the step and ``w1`` at
      the end of the training batch, so with momentum, weight decay and clipping. Only where ``||w0||`` is not zero.
      A rule of thumb is 1e-3.

    Over all parameters of the LightningModule that have a gradient at the step, chosen or not:

    - ``health/grad_norm``: the norm of all values together.
    - ``health/grad_norm_ratio``: largest over smallest norm of the gradient among the layers' weights, which are the
      parameters of two dimensions and more. Norms of zero are left out: they are in
    - ``health/grad_zero``: share of these weights whose gradient is zero everywhere.
    - ``health/grad_nonfinite``: share of the parameters whose gradient holds a NaN or an infinity.
    - ``health/update_ratio``: the ratio of the norms over all parameters together.

    A number that is not finite is not written: in a run that diverges the norms end, and ``grad_nonfinite`` and
    ``health/grad_nonfinite`` rise above zero. Gradients are taken as float32, a complex number as two values, of a
    sparse gradient those values that are stored, duplicates summed. A parameter that is shared stands under its first
    path. If a step evaluates its closure repeatedly (LBFGS), the first evaluation counts; if a parameter is stepped
    several times within a batch, the last step.

    At a sampled step it takes the memory of one more copy of the weights that are stepped, from before the step to the
    end of the batch, and 32 KiB for each histogram. With several ranks it is the first that computes, without any
    communication, since all of them step with the same gradients. DTensors (``ModelParallelStrategy``, FSDP2) are added
    up over the ranks, in three collectives.

    Args:
        every_n_steps: Distance of two samples in optimizer steps.
        parameters: Which parameters get tags of their own: a pattern of paths such as ``"net.*.weight"``, several of
            them, or a function of the path and the parameter that says whether. By default all that require a gradient.
        max_parameters: At most so many get tags of their own, the first ones; a warning says how many do not.

    Raises:
        ValueError: If a number is below 1, or ``parameters`` is something else.
        MisconfigurationException: If a fit starts with FSDP's first version or DeepSpeed.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[GradientMonitor(every_n_steps=100, parameters="*.weight")])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        parameters: str | Sequence[str] | Predicate | None = None,
        max_parameters: int = 200,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        check_integer("max_parameters", max_parameters, at_least=1)
        _check_parameters(parameters)
        self.every_n_steps = every_n_steps
        self.parameters = parameters
        self.max_parameters = max_parameters
        # By the number of the optimizer: one that steps in every second batch would never be seen otherwise, if the
        # multiples of every_n_steps all fall into the batches between.
        self._cadences: dict[int, TrainingCadence] = {}
        self._decided: set[str] = set()
        self._chosen: set[str] = set()
        self._left_out: set[str] = set()
        self._warned = False
        self._batch: _Batch | None = None
        self._ranges = TypicalRanges()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for base in type(trainer.strategy).__mro__:
            if stage == "fit" and base.__name__ in _REFUSED:
                raise MisconfigurationException(
                    f"GradientMonitor cannot be used with {base.__name__}: {_REFUSED[base.__name__]}. Remove the "
                    "callback, or choose another strategy."
                )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # What a checkpoint or the fit before left, if this one goes on from there.
        self._cadences = {
            index: cadence
            for index, cadence in self._cadences.items()
            if cadence.last is not None and cadence.last < trainer.global_step
        }
        self._decided, self._chosen, self._left_out, self._warned = set(), set(), set(), False
        if not self._cadences:
            self._ranges = TypicalRanges()
        self._choose(_by_path(pl_module))
        if not self._chosen:
            rank_zero_warn(
                f"GradientMonitor(parameters={self.parameters!r}) finds nothing to watch in "
                f"{type(pl_module).__name__}: none of the parameters that require a gradient is chosen. Choose others "
                "by `parameters`, such as '*.weight'."
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = _Batch(trainer.global_step, logged_step(trainer))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        batch = self._batch
        # Without a batch, the step is taken by some other hook; without a gradient, it does nothing.
        if batch is None or all(parameter.grad is None for parameter in _parameters(optimizer)):
            return
        if not self._is_due(batch, trainer, optimizer) or batch.seen.get(id(optimizer)) == trainer.global_step:
            return
        batch.seen[id(optimizer)] = trainer.global_step
        if batch.rows is None:
            parameters = _by_path(pl_module)
            self._choose(parameters)
            if not trainer.is_global_zero and not any(map(is_sharded, parameters.values())):
                return
            batch.rows = ParameterAccumulators(parameters, self._chosen, pl_module.device)
        batch.rows.record(_parameters(optimizer), _scale(trainer, optimizer))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sampled, self._batch = self._batch, None
        if sampled is None or sampled.rows is None:
            return
        sampled.rows.finish()
        if trainer.is_global_zero:
            self._publication(sampled.logged_step, sampled.rows.statistics()).write(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._batch = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._batch = None

    def state_dict(self) -> dict[str, Any]:
        last_sampled = {index: cadence.last for index, cadence in self._cadences.items()}
        return {"last_sampled": last_sampled, "ranges": self._ranges.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cadences = {
            index: TrainingCadence(self.every_n_steps, last) for index, last in state_dict["last_sampled"].items()
        }
        self._ranges.load_state_dict(state_dict["ranges"])

    def _is_due(self, batch: "_Batch", trainer: lightning.Trainer, optimizer: Optimizer) -> bool:
        """Whether the steps of an optimizer are to be sampled in a batch, however often it steps there."""
        index = next((index for index, known in enumerate(trainer.optimizers) if known is optimizer), -1)
        cadence = self._cadences.setdefault(index, TrainingCadence(self.every_n_steps))
        return cadence.is_due(batch.global_step) or id(optimizer) in batch.seen

    def _choose(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Decide on parameters that require a gradient and did not before; what was decided stays for the fit."""
        for path, parameter in parameters.items():
            if parameter.requires_grad and path not in self._decided:
                self._decided.add(path)
                if self._selects(path, parameter):
                    (self._chosen if len(self._chosen) < self.max_parameters else self._left_out).add(path)
        if self._left_out and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"GradientMonitor(max_parameters={self.max_parameters}) leaves out {len(self._left_out)} of "
                f"{len(self._chosen) + len(self._left_out)} parameters; the numbers under health/ are over all of "
                "them. Raise `max_parameters`, or choose by `parameters`, such as '*.weight'."
            )

    def _selects(self, path: str, parameter: nn.Parameter) -> bool:
        if self.parameters is None:
            return True
        if callable(self.parameters):
            return bool(self.parameters(path, parameter))
        patterns = [self.parameters] if isinstance(self.parameters, str) else self.parameters
        return any(fnmatchcase(path, pattern) for pattern in patterns)

    def _publication(self, step: int, statistics: Mapping[str, ParameterCounts]) -> Publication:
        chosen = {path: one for path, one in statistics.items() if path in self._chosen}
        scalars = {
            str(Tag("param", key, path)): value for path, one in chosen.items() for key, value in _scalars(one).items()
        }
        scalars |= {health_tag(key): value for key, value in _health(list(statistics.values())).items()}
        return Publication(
            step,
            scalars={tag: value for tag, value in scalars.items() if abs(value) <= _LARGEST},
            histograms={
                str(Tag("param", "grad_hist", path)): self._ranges.fit(path, one.histogram)
                for path, one in chosen.items()
                if one.histogram is not None
            },
        )


@dataclass
class _Batch:
    """One training batch.

    Args:
        global_step: Number of optimizer steps before it.
        logged_step: Where its values stand on the x-axis.
        rows: What is sampled of it.
        seen: By the sampled optimizer, the number of optimizer steps before the last step that is in the rows.
    """

    global_step: int
    logged_step: int
    rows: ParameterAccumulators | None = None
    seen: dict[int, int] = field(default_factory=dict)


def _check_parameters(parameters: Any) -> None:
    is_patterns = isinstance(parameters, Sequence) and all(isinstance(pattern, str) for pattern in parameters)
    if parameters is not None and not is_patterns and not callable(parameters):
        raise ValueError(
            f"parameters={parameters!r} is not possible: give patterns of paths such as 'net.*.weight', or a function "
            "of the path and the parameter."
        )


def _by_path(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters; one that is shared stands under its first path."""
    return {user_path(name): parameter for name, parameter in module.named_parameters()}


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _scale(trainer: lightning.Trainer, optimizer: Optimizer) -> float:
    """What the gradients are still multiplied by: fused optimizers divide by the scale of fp16 themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # Private, and what Lightning and torch ask, too.
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def _scalars(one: ParameterCounts) -> dict[str, float]:
    scalars = {"grad_norm": one.norm, "grad_rms": one.norm / math.sqrt(one.values)}
    if one.nonfinite > 0:
        scalars["grad_nonfinite"] = one.nonfinite / one.values
    if one.weight_norm > 0:
        scalars["update_ratio"] = one.update_norm / one.weight_norm
    return scalars


def _health(parameters: Sequence[ParameterCounts]) -> dict[str, float]:
    """Of all parameters with a gradient."""
    if not parameters:
        return {}
    weight_norm = math.hypot(*(one.weight_norm for one in parameters))
    health = {
        "grad_norm": math.hypot(*(one.norm for one in parameters)),
        "grad_nonfinite": sum(one.nonfinite > 0 for one in parameters) / len(parameters),
    }
    if weight_norm > 0:
        health["update_ratio"] = math.hypot(*(one.update_norm for one in parameters)) / weight_norm
    norms = [one.norm for one in parameters if one.dims >= 2]
    positive = [norm for norm in norms if norm > 0]
    if norms:
        health["grad_zero"] = norms.count(0.0) / len(norms)
    if positive and len(positive) + norms.count(0.0) == len(norms):
        health["grad_norm_ratio"] = max(positive) / min(positive)
    return health
