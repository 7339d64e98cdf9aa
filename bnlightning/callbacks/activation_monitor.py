"""The callback that logs histograms and health of the activations."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bnlightning._check import check_integer, check_number, check_share
from bnlightning.callbacks._monitor import MonitorCallback
from bnlightning.callbacks._steps import EvaluationCadence, StepAxis, step_count, steps_taken
from bnlightning.compare.names import TEST, TRAIN, VAL, place_text
from bnlightning.diagnosis.nonfinite import cures_nonfinite, where_nonfinite
from bnlightning.diagnosis.thresholds import make_thresholds
from bnlightning.monitors.activations import Activations
from bnlightning.monitors.catching.finite_check import Found
from bnlightning.monitors.catching.selection import Choice, checked_choices
from bnlightning.monitors.counting.layer_statistics import EFFECTIVE_RANK, LayerCounts, layer_statistics
from bnlightning.monitors.counting.ranks import world_size
from bnlightning.monitors.record import Record
from bnlightning.monitors.schedule import Schedule
from bnlightning.monitors.statistic import Statistic
from bnlightning.monitors.words import escaped, labelled
from bnlightning.writing.gallery import Picture
from bnlightning.writing.pictures import draw_distributions, draw_surfaces


class ActivationMonitor(MonitorCallback):
    """Show what the modules of any LightningModule put out: histograms, dead units, saturation, NaN.

    Training is bit for bit the same with and without it. Its numbers are exact over all samples, micro-batches and
    ranks of a sampled step. A sampled step takes five collectives, however many modules there are.

    | phase | what is sampled |
    |---|---|
    | training | all forward passes of one optimizer step out of ``every_n_steps`` |
    | validation within a fit | evaluations ``every_n_steps`` after the last sampled one, and the final one |
    | ``trainer.validate``, ``trainer.test`` | each one |

    A sampled step stands where ``self.log`` puts it, an evaluation at the number of steps taken. Where the final
    evaluation cannot be known beforehand, every one is looked at, and the final one is written when the fit ends.

    The numbers under ``health/`` are in ``trainer.callback_metrics`` on all ranks, for ``EarlyStopping`` and others.

    **Logged metrics.** ``<layer>`` is a module's path in the LightningModule. An evaluation has ``val_`` or ``test_``
    before the statistic, as in ``layer_val_dead/<layer>``. Every tag has a description in TensorBoard.

    - ``layer_hist/<layer>``: histogram of the finite outputs (TensorBoard and Weights & Biases). Outliers that would
      flatten the picture are counted in the outermost bin.
    - ``layer_mean``, ``layer_std``, ``layer_min``, ``layer_max``, ``layer_zero``: mean, population standard deviation,
      smallest value, largest value and share of zeros. All are over the finite outputs.
    - ``layer_nonfinite``: share of NaN and infinities among all outputs.
    - ``layer_saturated``, ``layer_saturated_low``, ``layer_saturated_high``: share of the outputs beyond
      :func:`saturation_limits`, for bounded activations.
    - ``layer_dead``: share of the dead units, which put out exactly zero. A unit with a NaN or an infinity is
      not dead but broken, and counts under ``layer_nonfinite``.
    - ``layer_dormant``: share of the units whose mean magnitude is at most ``tau`` times the mean over the layer's
      units (Sokar et al., ICML 2023).
    - ``layer_rarely_active``: share of the units that are non-zero for less than 1 % of the samples (Dohare et al.,
      Nature 2024, who call these dormant).
    - ``layer_saturated_units``: share of the units that are saturated for 95 % of the samples or more.
    - ``health/dead``, ``health/dormant``: share of all units of all activations. ``health/dead_max``: the worst layer.
      ``health/saturated``, ``health/nonfinite``: mean over the activations.
    - ``health/first_nonfinite_layer``, a text: where the first NaN or infinity was that made a loss non-finite. It is
      the module that put it out. ``before <module>`` or ``after <module>``: an operation that is no module made it.
      ``input:<entry>``: the batch held it. ``parameter <path>`` or ``buffer <path>``: they held it, as after a gradient
      that was not finite. ``loss``: no module was called.
    - ``health/watched``, a text: the layers that are watched, and the modules that cannot be.
    - ``health/values_by_step``, ``health/layers_by_step``, pictures: the outputs and the numbers of every layer at
      every sampled training step. White is measured and healthy. Drawn after the second sample, at the end of the
      epochs 1, 2, 4, 8, ..., and when the fit ends, by an exception as well.
    - ``health/warnings``, a text: the warnings of all monitors, newest first, each with the step at which it ended.

    **Units.** A unit is a feature of the layer before the activation: dimension 1 behind a convolution, the last
    dimension behind a linear layer. All positions of a sample count for its units. If the layer before does not tell, a
    unit is a channel of 4-D and 5-D outputs, otherwise an entry of the last dimension. Normalisations, linear and
    convolutional layers have no units. Padding counts like any other value.

    **Dead units.** A unit that used to fire for a share f of the samples is dead after n silent samples in a row, with
    (1 - f)^n below 1 %. That is 7 samples for a unit that fired for half of them. A unit that has never fired is dead
    after 459. A layer that has never fired is told earlier. :mod:`bnlightning.monitors.counting.firing` derives it.

    **The window.** In training the other numbers of units are over the last ``window_samples`` samples of the sampled
    steps, or up to twice as many. With batches of 50 and a sampled step every 10 steps, the default window reaches back
    200 to 400 steps. An evaluation is a window of its own.

    **Calls.** A second call of a module within a batch is ``<path>#1``, further ones ``#2`` to ``#15``. The last stands
    for all that follow. A tensor in a tuple, mapping, dataclass or class of attrs is ``<path>:0`` or ``<path>:logits``.
    A ``#`` or ``:`` in a name of the user's is ``%23`` or ``%3A``. Activations that are called as functions have no
    module: show them by :func:`bnlightning.tap`. A forward pass that activation checkpointing repeats does not count.

    **Values.** float64 and large integers are counted in float64, all others in float32. A complex number is two
    values. A nested tensor has the values of its parts, without padding. Sparse, quantised and masked tensors do not
    count, and ``health/watched`` names them.

    **torch.compile.** Compiled graphs show no gradients of outputs. The first non-finite value is the first in the
    order of the modules' paths. A step that is sampled or checked has a graph of its own, which inductor may round
    differently in half precision. What was compiled before the fit is compiled again (:func:`torch.compiler.reset`),
    since it would not call the hooks.

    **Transforms and exports.** Calls inside a transform of :mod:`torch.func` are left out, and a warning says so once.
    The hooks are on the modules only while a batch runs. A network that is exported, scripted, copied or saved between
    two batches is that of the author alone.

    **Memory.** A layer takes 33 kB of the device's memory in each phase, and 40 bytes for each unit. One of
    float64 takes 262 kB. It takes at most 3 kB of the event file at each sampled step. The pictures keep at most 128
    sampled steps, and distributions of 16 layers.

    Args:
        every_n_steps: Distance between two sampled steps, in optimizer steps.
        modules: The modules to watch: a type, a pattern of paths such as ``"net.act*"``, a function of path and module,
            or a list of these. Patterns find only modules without submodules. An exact path finds any. By default all
            activations and normalisations that are modules of their own: torch's, ours, and others whose class is named
            so, such as ``RMSNorm``, ``LayerNorm2d``, ``NewGELUActivation`` or ``QuickGELU``. ``health/watched`` names
            the classes that do not say what they are. The import path of a type
            or a function stands for it, as in a saved configuration.
        check_finite_every_n_steps: Distance between two training steps that are checked for NaN and infinities, until
            one is found. ``None``: no step is checked. Only 1, the default, finds the very first one. The check covers
            all modules without submodules that could make one, watched or not. It tells only of what makes a loss
            non-finite: the infinities of a mask do no harm. A step without a loss that Lightning sees is a fault if it
            leaves a parameter or a gradient that is not finite.
        window_samples: Least number of samples, of all ranks together, that the numbers of units are over. How often a
            unit used to fire is known from up to twice as many.
        tau: A unit is dormant up to this share of the layer's mean magnitude.
        output_gradients: Whether to log the gradients of the outputs in sampled training steps: ``layer_grad_hist``,
            ``layer_grad_mean``, ``_std``, ``_min``, ``_max``, ``_zero`` and ``_nonfinite``. They are gradients of the
            mean loss over the samples of all ranks, without the scale of a GradScaler. Only the backward pass of the
            loss counts, not one within ``training_step``, such as that of a gradient penalty. In manual optimisation
            each ``manual_backward`` or ``backward()`` counts, and no ``torch.autograd.grad``. Several of them count
            like several calls: their gradients are not added to each other.
        effective_rank: Whether to log ``layer_effective_rank``: the exponential of the entropy of a matrix's singular
            values (Roy & Vetterli, 2007). The matrix has samples and positions by units, and is not centred. The number
            needs many more samples than units. It takes 8 bytes times the number of units squared. Layers with more
            than 1024 units have none.
        statistics: Further numbers of every layer, declared as
            :class:`~bnlightning.monitors.statistic.Statistic` describes. By default none.
        max_layers: Largest number of watched layers. A warning says which are left out.
        warn_dead_above: Share of dead units in an activation above which to warn. ``None``: never.
        warn_dormant_above: The same for the share of dormant units, once it is over ``window_samples`` samples.
        warn_saturated_above: Share of saturated outputs above which to warn, from the first sampled step on.
        stop_on_nonfinite: Whether the first NaN or infinity stops the training. A CPU alone stops in the same step. A
            GPU or several ranks stop at the next sampled step. There is a warning in any case.

    Raises:
        ValueError: If a number of steps, samples or layers is below 1, or a share is not from 0 to below 1. Also if
            ``modules`` holds something else, and for ``stop_on_nonfinite`` with nothing checked.

    Example:
        >>> import lightning
        >>> monitor = ActivationMonitor(every_n_steps=100, warn_dead_above=0.5)
        >>> trainer = lightning.Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: Sequence[Choice] | Choice | None = None,
        check_finite_every_n_steps: int | None = 1,
        *,
        window_samples: int = 1000,
        tau: float = 0.025,
        output_gradients: bool = False,
        effective_rank: bool = False,
        statistics: Sequence[Statistic[LayerCounts]] = (),
        max_layers: int = 200,
        warn_dead_above: float | None = None,
        warn_dormant_above: float | None = None,
        warn_saturated_above: float | None = None,
        stop_on_nonfinite: bool = False,
    ) -> None:
        check_integer("window_samples", window_samples, at_least=1)
        check_number("tau", tau, at_least=0)
        check_integer("max_layers", max_layers, at_least=1)
        limits = {"dead": warn_dead_above, "dormant": warn_dormant_above, "saturated": warn_saturated_above}
        for name, limit in limits.items():
            if limit is not None:
                check_share(f"warn_{name}_above", limit)
        if check_finite_every_n_steps is not None:
            check_integer("check_finite_every_n_steps", check_finite_every_n_steps, at_least=1)
        elif stop_on_nonfinite:
            raise ValueError(
                "stop_on_nonfinite=True is not possible with check_finite_every_n_steps=None, which never looks: give "
                "check_finite_every_n_steps=1."
            )
        self.modules = checked_choices(modules)
        self.check_finite_every_n_steps = check_finite_every_n_steps
        self.window_samples = window_samples
        self.tau = tau
        self.output_gradients = output_gradients
        self.effective_rank = effective_rank
        self.statistics = list(statistics)
        self.max_layers = max_layers
        self.warn_dead_above = warn_dead_above
        self.warn_dormant_above = warn_dormant_above
        self.warn_saturated_above = warn_saturated_above
        self.stop_on_nonfinite = stop_on_nonfinite
        declared = [*layer_statistics(tau), *([EFFECTIVE_RANK] if effective_rank else []), *statistics]
        self._monitor = Activations(
            self.modules, window_samples=window_samples, max_layers=max_layers, statistics=declared
        )
        super().__init__(every_n_steps, self._monitor.catalogues, "layer", _PICTURES, make_thresholds(limits, declared))
        # One for both, so that nothing is told twice.
        self._mishaps = self._monitor.mishaps
        self._evaluation = EvaluationCadence(every_n_steps)
        self._checking, self._checked_at = Schedule(check_finite_every_n_steps or 1), -1
        self._told: set[str] = set()
        self._opened_at: dict[str, int] = {}
        self._axis = StepAxis()
        self._set_aside: Callable[[], None] | None = None
        self._forget()

    # A fit, from its first hook to its last.

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._check_loggers(trainer)
        self._attach(pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Not earlier: at the start of the fit, Lightning has not yet restored the step at which it goes on.
        self._checking, self._checked_at = Schedule(self.check_finite_every_n_steps or 1), -1
        self._evaluation.start(trainer, anew=not self._start(trainer))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._monitor.is_attached:
            return
        self._axis.start_batch(trainer)
        step = steps_taken(trainer)
        if self._schedule.is_due(step):
            self._opened_at[TRAIN] = step
            self._monitor.open(self._axis.batch, grad_scale=_grad_scale(trainer) if self.output_gradients else None)
        # Also once it is found: other steps have other graphs of torch.compile, of which there may not be many.
        if self._checking.is_due(step):
            self._checked_at = step
        if self.check_finite_every_n_steps is not None and self._checked_at == step:
            self._monitor.begin_check(self._axis.batch, batch, batch_idx)
        # In manual optimisation, training_step goes backward by itself, perhaps without a word.
        self._monitor.tell_backward(False if pl_module.automatic_optimization else None)
        self._monitor.observe()

    def on_before_zero_grad(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # An optimizer that evaluates the loss several times in a step runs all of training_step again.
        self._monitor.start_pass()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._monitor.expect_new_parameters()

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        self._monitor.check_loss(loss)
        if pl_module.automatic_optimization:
            self._monitor.tell_backward(True)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._monitor.tell_backward(False)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tells_at_once = self._monitor.end_check()
        if tells_at_once and world_size() == 1:
            self._report_nonfinite(trainer)
        self._monitor.pause()
        # Under gradient accumulation the sample goes on until the optimizer has stepped.
        if self._monitor.is_open() and steps_taken(trainer) > self._opened_at[TRAIN]:
            self._publish(trainer, TRAIN)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._draw_after_epoch(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, TRAIN)
        if self._evaluation.ends_with_aside(pl_module.device):
            self._publish(trainer, VAL)
        self._draw(trainer)
        self._report_nonfinite(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # With several ranks, a rank that has not failed would never join the reduction.
        if world_size() == 1:
            self._report_nonfinite(trainer)
        self._draw(trainer)
        self._detach(trainer)

    # Evaluations, within a fit or by themselves.

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._evaluation.is_looked_at(trainer):
            self._begin_evaluation(trainer, pl_module, VAL)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, TEST)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._monitor.observe(VAL)

    def on_test_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._monitor.observe(TEST)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._monitor.pause()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._monitor.pause()

    # Not at the end of the evaluation, where other callbacks decide by its numbers.

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._monitor.pause()
        if not self._evaluation.is_aside:
            self._publish(trainer, VAL)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, TEST)

    # Checkpoints.

    def _arguments(self) -> dict[str, Any]:
        names = inspect.signature(ActivationMonitor).parameters
        return {name: getattr(self, name) for name in names}

    def _state(self) -> dict[str, Any]:
        return {
            "evaluation": self._evaluation.last,
            "monitor": self._monitor.state_dict(),
            "is_checking": self._is_checking,
            **super()._state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._monitor.load_state_dict(state["monitor"])
        self._is_checking = state["is_checking"]
        self._evaluation.resume(state["evaluation"])

    def _begin_apart(self) -> None:
        """An evaluation outside of a fit, of any network: it knows nothing of a fit, and a fit nothing of it."""
        monitor, is_checking = self._monitor.state_dict(), self._is_checking
        gallery, troubles, health = self._gallery, self._troubles, dict(self._health)
        self._forget()

        def go_back() -> None:
            self._monitor.load_state_dict(monitor)
            self._is_checking, self._gallery, self._troubles = is_checking, gallery, troubles
            self._health = health

        self._set_aside = go_back

    def _detach(self, trainer: lightning.Trainer) -> None:
        step_count(trainer).stop(trainer)
        self._monitor.detach()
        if self._set_aside is not None:
            self._set_aside()
            self._set_aside = None

    def _forget(self) -> None:
        """Forget all earlier samples: a training begins anew."""
        super()._forget()
        self._monitor.forget()
        self._is_checking = self.check_finite_every_n_steps is not None

    def _attach(self, pl_module: lightning.LightningModule) -> None:
        checks = self.check_finite_every_n_steps is not None
        self._monitor.attach(pl_module, pl_module.device, checks=checks)
        self._opened_at, self._told, self._axis = {}, set(), StepAxis()

    def _begin_evaluation(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, phase: str) -> None:
        if not self._monitor.is_attached:
            self._begin_apart()
            self._attach(pl_module)
            self._metrics = trainer.callback_metrics
        self._monitor.open(self._axis.evaluation(trainer), phase)

    def _publish(self, trainer: lightning.Trainer, phase: str) -> None:
        """Close a sample, reduce it over the ranks, and write its record."""
        record = self._monitor.close(phase)
        if record is None:
            return
        self._tell_what_is_left_out()
        self._tell(trainer, self._with_what_is_watched(trainer, record))
        self._show(trainer, record, self.window_samples)
        self._end_nonfinite(trainer, record)
        self._report_nonfinite(trainer)

    @property
    def rules(self) -> list[str]:
        """What the monitor looks for, in words."""
        return [*super().rules, *([_NONFINITE] if self.check_finite_every_n_steps is not None else [])]

    def _end_nonfinite(self, trainer: lightning.Trainer, record: Record) -> None:
        """Take down that there are no NaN and infinities any more, if a later sample has none."""
        shares = [layer.numbers.get("nonfinite", 0.0) for layer in record.layers.values()]
        since = max((row.since for row in self._troubles.rows if row.rule == _NONFINITE), default=record.step)
        if not shares or any(shares) or record.phase != TRAIN or record.step <= since:
            return
        if self._take_down(trainer, _NONFINITE, TRAIN, record.step, {}).ended:
            rank_zero_info(f"ActivationMonitor: there are no NaN and infinities any more at step {record.step}.")

    def _report_nonfinite(self, trainer: lightning.Trainer) -> None:
        found = self._monitor.first_nonfinite() if self._is_checking and self._monitor.is_attached else None
        if found is None:
            return
        is_told = any(other.has_found_nonfinite for other in self._of_this_class(trainer))
        self._is_checking = False
        if self.stop_on_nonfinite:
            trainer.should_stop = True
        if is_told:
            return
        warning = ""
        with self._mishaps.forgiven("name where the first NaN or infinity came from"):
            warning = self._tell_of_nonfinite(trainer, found)
        if warning:
            rank_zero_warn(warning)

    @property
    def has_found_nonfinite(self) -> bool:
        """Whether the first NaN or infinity of the training has been found."""
        return self.check_finite_every_n_steps is not None and not self._is_checking

    def _tell_of_nonfinite(self, trainer: lightning.Trainer, found: Found) -> str:
        """Write where the first NaN or infinity came from, and return the warning."""
        step, _, place = found
        # A fact of the network, whichever of several monitors finds it: its tag has no number.
        self._write(trainer, Record(step, texts={"first_nonfinite_layer": place_text(str(place))}))
        module_of = self._monitor.observer.module_of
        where = where_nonfinite(place, step, module_of)
        layer = labelled(place.path, module_of(place.path)) if place.is_of_module else str(place)
        self._take_down(trainer, _NONFINITE, TRAIN, step, {layer: f"{where}."})
        stops = any(one.stop_on_nonfinite for one in self._of_this_class(trainer))
        consequence = "training stops" if stops else "training goes on (stop_on_nonfinite=True stops it)"
        return f"ActivationMonitor: {where}; {consequence}. {cures_nonfinite(place)}"

    def _tell_what_is_left_out(self) -> None:
        transformed = self._monitor.observer.transformed
        if transformed is not None and "transformed" not in self._told:
            self._told.add("transformed")
            rank_zero_warn(
                f"ActivationMonitor leaves out {transformed} and whatever else is called inside a transform of "
                "torch.func, such as vmap or grad: call the network itself, too, to have it counted."
            )
        left_out = list(self._monitor.observer.left_out)
        if left_out and "left out" not in self._told:
            self._told.add("left out")
            self._warn_of_left_out("max_layers", self.max_layers, left_out, "layers", "others by `modules`.")

    def _with_what_is_watched(self, trainer: lightning.Trainer, record: Record) -> Record:
        """The record, with a text on what is watched if it is the first one."""
        # On rank 0, which writes, nothing may have run. So the record's layers count as seen, too.
        seen = list(dict.fromkeys([*self._monitor.observer.seen, *record.layers]))
        unreadable = self._monitor.observer.unreadable
        if "watched" in self._told:
            # Such as nested tensors, which layers of torch put out in evaluations only.
            if not self._told.issuperset(unreadable):
                described = [f"{label} ({kind})" for label, kind in unreadable.items() if label not in self._told]
                rank_zero_info(f"ActivationMonitor leaves out what it cannot count: {', '.join(described[:20])}.")
                self._told.update(unreadable)
            return record
        self._told.update(["watched", *unreadable])
        if not seen and not self._monitor.observer.watched:
            self._warn_of_nothing(
                "modules",
                self.modules,
                trainer.lightning_module,
                "no module is an activation or a normalisation of its own. Make activations modules, choose others by "
                "`modules`, such as 'net.*', or show tensors by bnlightning.tap(x, 'name'). "
                + self._monitor.observer.report_unknown(),
            )
            return record
        with self._mishaps.forgiven("report what is watched"):
            has_activation = any(layer.is_activation for layer in record.layers.values())
            text = self._monitor.observer.report(seen, has_activation=has_activation)
            rank_zero_info(f"ActivationMonitor: {text}")
            record = replace(record, texts={**record.texts, "watched": escaped(text)})
        return record


_NONFINITE = "NaN and infinities"
_PICTURES = (
    Picture(
        "layers_by_step",
        draw_surfaces,
        "The numbers of every layer at every sampled training step, over all ranks. Dormant units are over the window. "
        "At most 128 steps. Healthy: white, which is measured and within the range under each scale. Up to "
        "80 % of zeros are healthy. Hatched was not measured.",
    ),
    Picture(
        "values_by_step",
        draw_distributions,
        "The distribution of each layer's outputs at every sampled training step, over all samples and ranks of the "
        "step. At most 16 layers and 128 steps. Healthy: bands that neither shrink nor widen. White is where no values "
        "are. Hatched was not measured.",
    ),
)


def _grad_scale(trainer: lightning.Trainer) -> float:
    """The factor from the gradient of a rank's own scaled loss to the gradient of the mean loss over all ranks."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 / (world_size() * (scaler.get_scale() if scaler is not None else 1.0))
