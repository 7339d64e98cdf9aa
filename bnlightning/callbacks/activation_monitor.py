"""Histograms and health of the activations, in TensorBoard."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from bnlightning._check import check_integer, check_number, check_share
from bnlightning.callbacks._steps import EvaluationCadence, StepAxis
from bnlightning.compare.names import TEST, TRAIN, VAL, Tag, health_tag
from bnlightning.diagnosis.thresholds import make_thresholds, warn_above
from bnlightning.monitors.catching.finite_check import FiniteCheck, make_check
from bnlightning.monitors.catching.observer import Observer
from bnlightning.monitors.catching.selection import Choice, checked_choices
from bnlightning.monitors.counting.histogram import TypicalRanges, finite_histogram
from bnlightning.monitors.counting.layer_statistics import RecentUnits, health, statistics
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey, LayerSums, UnitSums
from bnlightning.monitors.counting.ranks import first_of_ranks, world_size
from bnlightning.monitors.schedule import TrainingCadence
from bnlightning.writing.history import History
from bnlightning.writing.pictures import draw_distributions, draw_surfaces
from bnlightning.writing.writers import Publication

_TRAINING = TRAIN
_SURFACES = ("nonfinite", "dead", "dormant", "saturated", "zero", "std")
_NAMES = {TRAIN: "training", VAL: "validation", TEST: "test"}


class ActivationMonitor(Callback):
    """Show what the modules of any LightningModule put out: histograms, dead units, saturation, NaN.

    Training is bit for bit the same with and without it. It samples: all forward passes of one optimizer step out of
    ``every_n_steps``; evaluations within a fit that begin at least so many steps after the last one sampled, or with
    the final weights; every ``trainer.validate`` and ``trainer.test``. What is sampled is exact over the samples of all
    micro-batches and ranks; a publication takes five collectives, however many modules there are.

    Logged, for every watched module by its path in the LightningModule, in training where Lightning's ``self.log``
    would put it (the number of steps taken before the forward pass); with the prefix ``val_`` (or ``test_``) for an
    evaluation, over all its batches, at the number of steps taken:

    - ``hist``: histogram of the finite output values (TensorBoard and Weights & Biases). Values far outside of what
      is typical, which would flatten the picture, are counted in its outermost bin; ``min`` and ``max`` tell
      how far.
    - ``mean``, ``std``, ``min``, ``max``: of the finite values; the population's standard deviation.
    - ``zero``: share of zeros among the finite values; around one half is healthy for a ReLU.
    - ``nonfinite``: share of NaN and infinities among all values.
    - ``saturated``, and its parts ``saturated_low`` and ``saturated_high``: share of the finite values
      beyond :func:`saturation_limits`, for bounded activations.

    Of the units of what is no normalisation and no linear or convolutional layer, in training over the last
    ``window_samples`` to twice as many samples of the sampled steps (fewer at the beginning), in an evaluation over all
    of it. A unit that died within the window still counts as alive: with a batch of 50 and a sample every 10 steps the
    default window reaches back 200 to 400 steps. Evaluations have no such delay.

    - ``dead``: share of the units whose output was exactly zero for every sample (for a ReLU: that never fired). A
      unit with a NaN or an infinity is not dead but broken, and counts under ``nonfinite``.
    - ``dormant``: share of the tau-dormant units: mean magnitude at most ``tau`` times the mean over the layer's
      units (Sokar et al., ICML 2023).
    - ``rarely_active``: share of the units that were not zero for less than 1 % of the samples (Dohare et al.,
      Nature 2024, who call these dormant).
    - ``saturated_units``: share of the units beyond the limits for 95 % of the samples or more.

    A unit is a feature of the layer before the activation: an entry of dimension 1 behind a convolution, of the last
    dimension behind a linear layer; samples are then also its positions. Where that cannot be told it is a channel of
    4-D and 5-D output, otherwise an entry of the last dimension. Padding counts like anything else.

    All activations together (normalisations not), with ``val_`` in front for an evaluation:

    - ``health/dead``, ``health/dormant``: share of all units; ``health/dead_max``: of the worst layer.
    - ``health/saturated``, ``health/nonfinite``: mean over the layers.
    - ``health/first_nonfinite_layer``: as text, the first module in the order of execution that put out a NaN or an
      infinity in training, at the first step checked at which one did; ``input`` if it came with the batch,
      ``before <module>`` or ``after <module>`` if an operation that is no module made it.
    - ``health/watched``: as text, once: what is watched and what cannot be.

    In the Images tab, of the samples of the training so far (at most 128, evenly spaced, and 16 layers of those there
    are in the first picture), at the end of the epochs 1, 2, 4, 8, ... and of the training:

    - ``health/values_by_step``: how each layer's values are distributed at each step.
    - ``health/layers_by_step``: the shares above and the standard deviation of every activation at each step.

    The second and any further call of a module within a batch has ``#1``, ``#2``, ... behind its path, up to ``#15``
    for all that follow; a tensor in a tuple, mapping or dataclass ``:0`` or ``:logits``. Activations that are called as
    functions have no module: :func:`bnlightning.tap` shows them. Calls by activation checkpointing that only repeat a
    forward pass do not count. Inside ``torch.compile`` gradients of outputs are not seen, a first non-finite value is
    the first in the order of the modules' paths, and a sampled step has a graph of its own; what was compiled before
    the fit is compiled again (:func:`torch.compiler.reset`), since it would not call the hooks. A layer takes 33 kB of
    the device's memory in each phase (training, validation) and 32 bytes a unit, and at most 3 kB of the file a sample.

    Args:
        every_n_steps: Distance of two samples in optimizer steps.
        modules: What to watch: a type of modules, a pattern of module paths such as ``"net.act*"``, a function of a
            path and a module, or several of these. By default all activations and normalisations that are modules of
            their own. Patterns find modules without submodules only, a module's exact path finds any.
        check_finite_every_n_steps: At which training steps all modules without submodules, watched or not, that could
            make a non-finite value are checked for one, until one is found; ``None``: never. Only at 1, the default,
            it is the very first. A module that puts out infinities on purpose, such as a mask, is found, too.
        window_samples: Over how many samples of all ranks the units' numbers are, at least.
        tau: Of ``dormant``.
        output_gradients: Whether the gradients of the outputs are watched, too, in the training's samples:
            ``act_grad_hist``, ``act_grad_mean``, ``_std``, ``_min``, ``_max``, ``_zero`` and ``_nonfinite``, of the
            mean loss over the samples of all ranks, without the scale of a GradScaler.
        effective_rank: Whether ``effective_rank`` is logged, the exponential of the entropy of the singular values
            of the matrix of samples and positions by units, not centred (Roy & Vetterli, 2007), over one sample, for up
            to 1024 units. It takes many more samples than units, and units squared times 8 bytes of memory.
        max_layers: Watch no more than so many (calls of) modules; what is left out is told.
        warn_dead_above: Warn once when ``dead`` of an activation exceeds it, over ``window_samples`` or more.
        warn_dormant_above: Likewise of ``dormant``.
        warn_saturated_above: Likewise of ``saturated``.
        stop_on_nonfinite: Whether the first non-finite value stops the training: on a CPU in the same step, on a GPU or
            several ranks at the next sample. There is a warning of it in any case.

    Raises:
        ValueError: If a number of steps is below 1, a share is none, nothing would be checked, or ``modules`` is
            something else.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[ActivationMonitor(every_n_steps=100, warn_dead_above=0.5)])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        modules: Choice | Sequence[Choice] | None = None,
        check_finite_every_n_steps: int | None = 1,
        *,
        window_samples: int = 1000,
        tau: float = 0.025,
        output_gradients: bool = False,
        effective_rank: bool = False,
        max_layers: int = 200,
        warn_dead_above: float | None = None,
        warn_dormant_above: float | None = None,
        warn_saturated_above: float | None = None,
        stop_on_nonfinite: bool = False,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        if check_finite_every_n_steps is not None:
            check_integer("check_finite_every_n_steps", check_finite_every_n_steps, at_least=1)
        check_integer("window_samples", window_samples, at_least=1)
        check_number("tau", tau, at_least=0)
        check_integer("max_layers", max_layers, at_least=1)
        limits = {"dead": warn_dead_above, "dormant": warn_dormant_above, "saturated": warn_saturated_above}
        for name, limit in limits.items():
            if limit is not None:
                check_share(f"warn_{name}_above", limit)
        if stop_on_nonfinite and check_finite_every_n_steps is None:
            raise ValueError(
                "stop_on_nonfinite=True is not possible with check_finite_every_n_steps=None, which never looks: give "
                "check_finite_every_n_steps=1."
            )
        self.every_n_steps = every_n_steps
        self.modules = checked_choices(modules)
        self.check_finite_every_n_steps = check_finite_every_n_steps
        self.window_samples = window_samples
        self.tau = tau
        self.output_gradients = output_gradients
        self.effective_rank = effective_rank
        self.max_layers = max_layers
        self.thresholds = make_thresholds(limits)
        self.stop_on_nonfinite = stop_on_nonfinite
        self._evaluation = EvaluationCadence(every_n_steps)
        self._loaded: dict[str, Any] | None = None
        self._ended: dict[str, Any] = {}
        self._state: _State | None = None

    # A fit, from its first hook to its last.

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._attach(pl_module)
        assert self._state is not None
        self._state.is_fit = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Not before: when the fit starts, Lightning has not yet restored at which step it goes on.
        self._evaluation.start(trainer.global_step)
        # What a checkpoint or the fit before left, if this one goes on from there. (An evaluation loads, too.)
        before, self._loaded = self._loaded or self._ended, None
        if before and before["sampling"] is not None and before["sampling"] < trainer.global_step:
            self._restore(before)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        state = self._state
        if state is None:
            return
        state.axis.start_batch(trainer)
        if state.sampling.is_due(trainer.global_step):
            state.open(_TRAINING, state.axis.batch, trainer.global_step)
            if self.output_gradients:
                state.observer.grad_scale = _grad_scale(trainer)
        if state.is_checking and state.checking is not None and state.checking.is_due(trainer.global_step):
            state.check.begin(state.axis.batch)
            state.observer.check = state.check
        state.observe(_TRAINING)

    def on_before_zero_grad(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # An optimizer that evaluates the loss several times in a step runs all of training_step again.
        if self._state is not None:
            self._state.observer.start_pass()

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        state = self._state
        if state is not None and state.observer.check is not None:
            state.observer.look_at_sums()
            state.check.update_loss(loss.detach())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        state = self._state
        if state is None:
            return
        if state.observer.check is not None:
            state.observer.look_at_sums()
            state.check.end()
            state.observer.check = None
            if state.check.is_immediate and world_size() == 1:
                self._report_nonfinite(trainer)
        state.observer.stop()
        # Under gradient accumulation the window goes on until the optimizer has stepped.
        if _TRAINING in state.opened and trainer.global_step > state.opened[_TRAINING].global_step:
            self._publish(trainer, _TRAINING)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        number = trainer.current_epoch + 1
        # A power of two: what a picture shows has doubled, and drawing costs a vanishing part of a long training.
        if number & (number - 1) == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, _TRAINING)
        self._draw(trainer)
        if self._state is not None and self._state.is_checking:
            self._report_nonfinite(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # On several ranks another one may not have failed, and would never join the reduction.
        if self._state is not None and self._state.is_checking and world_size() == 1:
            self._report_nonfinite(trainer)
        self._detach()

    # Evaluations, within a fit or by themselves.

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, VAL, due=self._evaluation.is_due(trainer))

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module, TEST, due=True)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._state is not None:
            self._state.observe(VAL)

    def on_test_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._state is not None:
            self._state.observe(TEST)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, VAL)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer, TEST)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        if state is None:
            # After the fit, too, a checkpoint of it may be saved.
            return self._ended
        return {
            "recent": state.recent.state_dict(),
            "ranges": state.ranges.state_dict(),
            "history": state.history.state_dict(),
            "sampling": state.sampling.last,
            "evaluation": self._evaluation.last,
            "is_checking": state.is_checking,
            "warned": sorted(state.warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _restore(self, loaded: dict[str, Any]) -> None:
        assert self._state is not None
        self._state.recent.load_state_dict(loaded["recent"])
        self._state.ranges.load_state_dict(loaded["ranges"])
        self._state.history.load_state_dict(loaded["history"])
        self._state.sampling.last = loaded["sampling"]
        self._evaluation.resume(loaded["evaluation"])
        self._state.is_checking = loaded["is_checking"]
        self._state.warned = set(loaded["warned"])

    def _attach(self, pl_module: lightning.LightningModule) -> None:
        self._detach()
        checks = self.check_finite_every_n_steps is not None
        observer = Observer(self.modules, self.max_layers)
        observer.attach(pl_module, checks, pl_module.device)
        self._state = _State(
            observer=observer,
            device=pl_module.device,
            effective_rank=self.effective_rank,
            sampling=TrainingCadence(self.every_n_steps),
            checking=TrainingCadence(self.check_finite_every_n_steps) if self.check_finite_every_n_steps else None,
            check=make_check(pl_module.device),
            is_checking=checks,
            recent=RecentUnits(self.window_samples),
        )

    def _detach(self) -> None:
        if self._state is not None:
            if self._state.is_fit:
                self._ended = self.state_dict()
            self._state.observer.detach()
        self._state = None

    def _begin_evaluation(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, phase: str, *, due: bool
    ) -> None:
        if due and self._state is None:
            self._attach(pl_module)
        if due and self._state is not None:
            self._state.open(phase, self._state.axis.evaluation(trainer), trainer.global_step)

    def _publish(self, trainer: lightning.Trainer, phase: str) -> None:
        """Reduce a window over the ranks, write it, close it."""
        state = self._state
        if state is None or phase not in state.opened:
            return
        state.observer.stop()
        opened = state.opened.pop(phase)
        layers = opened.window.reduce(state.device)
        recent = {
            key: state.recent.add(key, layer.units) if phase == _TRAINING else layer.units
            for key, layer in layers.items()
            if layer.units is not None
        }
        numbers = {key: statistics(key, layer, recent.get(key), self.tau) for key, layer in layers.items()}
        publication = _publication(opened.step, phase, layers, numbers, state.ranges)
        summary = health((numbers[key], key.units) for key in layers if key.is_activation)
        publication.scalars |= {health_tag(name, phase): value for name, value in summary.items()}
        self._tell_what_is_watched(trainer, publication, [key.label for key in layers if key.family == "layer"])
        publication.write(trainer)
        if phase == _TRAINING and trainer.is_global_zero:
            _remember(state.history, opened.step, layers, numbers)
        self._warn_of_thresholds(phase, opened.step, numbers, recent)
        if state.is_checking:
            self._report_nonfinite(trainer)

    def _draw(self, trainer: lightning.Trainer) -> None:
        """Pictures of all samples so far, if there are new ones."""
        state = self._state
        if state is None or not trainer.is_global_zero:
            return
        steps = state.history.steps
        # One step is no picture.
        if len(steps) < 2 or steps[-1] == state.drawn:
            return
        state.drawn = int(steps[-1])
        Publication(
            state.drawn,
            figures={
                "health/values_by_step": lambda: draw_distributions(state.history),
                "health/layers_by_step": lambda: draw_surfaces(state.history, _SURFACES),
            },
        ).write(trainer)

    def _warn_of_thresholds(
        self,
        phase: str,
        step: int,
        numbers: dict[LayerKey, dict[str, float]],
        recent: dict[LayerKey, UnitSums],
    ) -> None:
        assert self._state is not None
        layers = {key.label: (numbers[key], units.samples) for key, units in recent.items() if key.is_activation}
        for threshold in self.thresholds:
            if threshold.argument not in self._state.warned and warn_above(
                threshold, layers, f"{_NAMES[phase]} at step {step}", self.window_samples
            ):
                self._state.warned.add(threshold.argument)

    def _report_nonfinite(self, trainer: lightning.Trainer) -> None:
        state = self._state
        assert state is not None
        found = first_of_ranks(state.check.found(), state.device)
        if found is None:
            return
        state.is_checking = False
        step, _, place = found
        Publication(step, texts={"health/first_nonfinite_layer": place}).write(trainer)
        consequence = (
            "training stops" if self.stop_on_nonfinite else "training goes on (stop_on_nonfinite=True stops it)"
        )
        rank_zero_warn(f"ActivationMonitor: {_where_nonfinite(place, step)}; {consequence}. {_cures_nonfinite(place)}")
        if self.stop_on_nonfinite:
            trainer.should_stop = True

    def _tell_what_is_watched(
        self, trainer: lightning.Trainer, publication: Publication, labels: Sequence[str]
    ) -> None:
        state = self._state
        assert state is not None
        observer = state.observer
        # Rank 0, which tells, may be one on which nothing ran.
        seen = list(dict.fromkeys([*observer.seen, *labels]))
        if observer.left_out and "max_layers" not in state.told:
            state.told.add("max_layers")
            rank_zero_warn(
                f"ActivationMonitor(max_layers={self.max_layers}) leaves out {len(observer.left_out)} layers from "
                f"{next(iter(observer.left_out))} on: raise max_layers, or choose others by `modules`."
            )
        if "watched" in state.told:
            return
        state.told.add("watched")
        if not seen and not observer.watched:
            rank_zero_warn(
                f"ActivationMonitor(modules={self.modules!r}) finds nothing to watch in "
                f"{type(trainer.lightning_module).__name__}. By default it watches activations and normalisations that "
                "are modules of their own. Make activations modules, choose others by `modules`, such as 'net.*', or "
                "show tensors by bnlightning.tap(x, 'name')."
            )
            return
        text = _report(observer, seen)
        rank_zero_info(f"ActivationMonitor: {text}")
        publication.texts["health/watched"] = text


@dataclass
class _Opened:
    step: int
    global_step: int
    window: LayerAccumulators


@dataclass
class _State:
    """All that a monitor holds while it is attached, and nothing of which it keeps."""

    observer: Observer
    device: torch.device
    effective_rank: bool
    sampling: TrainingCadence
    checking: TrainingCadence | None
    check: FiniteCheck
    is_checking: bool
    recent: RecentUnits
    is_fit: bool = False
    ranges: TypicalRanges = field(default_factory=TypicalRanges)
    history: History = field(default_factory=History)
    drawn: int = 0
    axis: StepAxis = field(default_factory=StepAxis)
    # Apart, since an evaluation may come in the middle of an accumulation of gradients; those not open are kept to be
    # used again.
    opened: dict[str, _Opened] = field(default_factory=dict)
    windows: dict[str, LayerAccumulators] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def open(self, phase: str, step: int, global_step: int) -> None:
        """What is observed in ``phase`` from now on goes into a window that will be published at ``step``."""
        window = self.windows.setdefault(phase, LayerAccumulators(self.effective_rank))
        window.reset()
        self.opened[phase] = _Opened(step, global_step, window)

    def observe(self, phase: str) -> None:
        """A batch of ``phase`` begins."""
        opened = self.opened.get(phase)
        self.observer.start(opened.window if opened is not None else None)


def _publication(
    step: int,
    phase: str,
    layers: dict[LayerKey, LayerSums],
    numbers: dict[LayerKey, dict[str, float]],
    ranges: TypicalRanges,
) -> Publication:
    publication = Publication(step)
    for key, layer in layers.items():
        publication.scalars |= {_tag(key, name, phase): value for name, value in numbers[key].items()}
        if layer.minimum <= layer.maximum:
            histogram = finite_histogram(layer.bins, layer.minimum, layer.maximum, layer.sum, layer.sum_squares)
            tag = _tag(key, "hist", phase)
            publication.histograms[tag] = ranges.fit(tag, histogram)
    return publication


def _tag(key: LayerKey, name: str, phase: str) -> str:
    return str(Tag("layer", f"grad_{name}" if key.family == "layer_grad" else name, key.label, phase))


def _remember(
    history: History, step: int, layers: dict[LayerKey, LayerSums], numbers: dict[LayerKey, dict[str, float]]
) -> None:
    bins = {key.label: layer.bins for key, layer in layers.items() if key.family == "layer"}
    # Of what has no units half of the picture would be empty.
    activations = [key for key in layers if key.is_activation] or [key for key in layers if key.family == "layer"]
    statistics = {name: {key.label: numbers[key].get(name) for key in activations} for name in _SURFACES}
    history.add(step, bins, statistics)


def _where_nonfinite(place: str, step: int) -> str:
    if place == "input":
        return f"the batch of step {step} holds a NaN or an infinity"
    if place == "loss":
        return f"at step {step} the loss is the first NaN or infinity"
    side, _, module = place.rpartition(" ")
    where = {
        "": f"in the output of {module}",
        "before": f"in the input of {module}, made by an operation that is no module",
        "after": f"in the loss, made by an operation behind {module}",
    }[side]
    return f"at step {step} the first NaN or infinity is {where}"


def _cures_nonfinite(place: str) -> str:
    if place == "input":
        return "Usual cures: clean the data, or skip such batches."
    return (
        "Usual cures: a lower learning rate or a warm-up, gradient clipping, a normalisation in front of the layer, "
        "smaller initial weights, bf16 in the place of fp16."
    )


def _grad_scale(trainer: lightning.Trainer) -> float:
    """From a rank's gradient of its own, scaled loss to that of the mean loss over all ranks."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 / (world_size() * (scaler.get_scale() if scaler is not None else 1.0))


def _report(observer: Observer, seen: Sequence[str]) -> str:
    paths = {label.partition("#")[0].partition(":")[0] for label in seen}
    sentences = [f"{len(seen)} layer{'s are' if len(seen) != 1 else ' is'} watched: {_listed(seen)}."]
    unseen = [path for path in observer.watched if path not in paths and path not in observer.without_tensor]
    if unseen:
        sentences.append(f"Not called so far: {_listed(unseen)}.")
    if observer.without_tensor:
        described = [f"{path} ({kind})" for path, kind in observer.without_tensor.items()]
        sentences.append(f"They put out no floating tensor: {_listed(described)}.")
    if observer.refused:
        sentences.append(f"Compiled by TorchScript, which takes no hooks: {_listed(observer.refused)}.")
    sentences.append(
        "What else is called as a function, such as torch.relu(x), cannot be seen: make it a module, or show it by "
        "bnlightning.tap(x, 'name')."
    )
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
