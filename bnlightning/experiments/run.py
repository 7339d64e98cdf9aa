"""One run: its parts, made from the configuration, and what is done with them."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from bnlightning.compare.names import parse_run_directory
from bnlightning.experiments import faults
from bnlightning.experiments.signals import Signals
from bnlightning.experiments.trainer_parts import Progress, RunLogger

# torch's own choice.
_NUM_THREADS = torch.get_num_threads()
# By what people compare runs, whatever is swept.
_COMPARED_BY = ("model.norm", "model.activation", "model.learning_rate")


class Run:
    """A run that is ready to begin: seeded, and everything in its configuration instantiated.

    Args:
        config: The composed configuration.
        signals: Those of the command, which may end the run.
        swept: The keys of which the command gives several values.
        num_threads: torch's threads if the configuration says nothing; the default is what torch chose at first.
    """

    def __init__(
        self, config: DictConfig, signals: Signals, swept: Sequence[str] = (), num_threads: int = _NUM_THREADS
    ) -> None:
        torch.set_num_threads(config.num_threads or num_threads)
        lightning.seed_everything(config.seed, workers=True, verbose=False)
        self._model = instantiate(config.model, _convert_="all")
        self._data = instantiate(config.data, _convert_="all")
        self._progress = Progress(signals)
        callbacks = [*instantiate(config.callbacks, _convert_="all").values(), self._progress]
        self.trainer: lightning.Trainer = instantiate(config.trainer, _convert_="all", callbacks=callbacks)
        self._ckpt_path = config.ckpt_path
        # For strategies that read checkpoints by themselves. Lightning 2.5 has no such argument.
        reads = "weights_only" in inspect.signature(self.trainer.fit).parameters
        self._reading: dict[str, Any] = {"weights_only": not config.trust_ckpt} if reads else {}
        self._given = _given(config, swept)
        self._name = name_of_run(config, swept)

    def hide_progress(self) -> None:
        """Show no progress bar: those of several runs at the same time would overwrite each other."""
        if self.trainer.progress_bar_callback is not None:
            self.trainer.progress_bar_callback.disable()

    def train(self) -> None:
        """Evaluate, fit, evaluate, test, and log the outcome.

        Raises:
            ValueError: If something of the configuration is not possible.
            RuntimeError: In the place of a ``ValueError`` once a batch has been taken: no fault of the configuration.
        """
        if self.trainer.is_global_zero:
            threads = torch.get_num_threads()
            print(f"Training {self._name} on {threads} thread{'s' * (threads > 1)}", flush=True)
        try:
            self._evaluate_and_fit()
        except ValueError as error:
            if self._progress.has_begun:
                raise RuntimeError(faults.amid_the_run(error)) from error
            raise
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_outcome(self._given)

    def _evaluate_and_fit(self) -> None:
        evaluates = is_overridden("validation_step", self._model)
        # What the network does before its first step belongs to the story; a resumed run has told it already.
        if evaluates and self._ckpt_path is None:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Evaluation with running statistics that no batch has updated"
                )
                self._validate()
        self.trainer.fit(self._model, self._data, ckpt_path=self._ckpt_path, **self._reading)
        if evaluates and self._progress.evaluated_at != self.trainer.global_step:
            self._validate()
        if is_overridden("test_step", self._model):
            self.trainer.test(self._model, self._data, verbose=False)

    def _validate(self) -> None:
        self.trainer.validate(self._model, self._data, verbose=False)


def name_of_run(config: DictConfig, swept: Sequence[str]) -> str:
    """The run that Hydra does now, as people call it: "batch norm (ours), depth 10, seed 2".

    Args:
        config: Its configuration.
        swept: The keys of which the command gives several values.
    """
    known = {key.rpartition(".")[2]: value for key, value in _given(config, swept).items()}
    return parse_run_directory(HydraConfig.get().sweep.subdir, known).in_words_with_seed


def _given(config: DictConfig, swept: Sequence[str]) -> dict[str, Any]:
    """What the run was given of what is swept, and by what people compare it."""
    options = HydraConfig.get().runtime.choices
    found = {key: options[key] if key in options else OmegaConf.select(config, key) for key in (*swept, *_COMPARED_BY)}
    # A module need not have all of them; a swept null is a value.
    return {key: value for key, value in found.items() if value is not None or key in swept}
