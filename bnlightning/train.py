"""The application: ``python -m bnlightning.train +experiment=tanh``."""

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from bnlightning._conf import CONF_DIR
from bnlightning.compare import compare_runs

# Under DDP Lightning starts this command again for every other rank: they find here what rank 0 made of the clock.
_OUTPUT_DIR = "BNLIGHTNING_OUTPUT_DIR"


class CompareRuns(Callback):
    """Hydra's callback around a sweep: one directory before it, one comparison after it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the directory, and name the subdirectory of each run by its normalisation and what else is swept."""
        directory = Path(config.hydra.sweep.dir).resolve()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            sys.exit(
                f"output_dir={str(directory)!r} cannot be written ({error.strerror}): give another, output_dir=PATH."
            )
        os.environ[_OUTPUT_DIR] = str(directory)
        swept = [key for key in _swept_keys(config) if key != "model.norm"]
        name = ",".join(["${model.norm}", *(f"{key.split('.')[-1]}=${{{key}}}" for key in swept)])
        config.hydra.overrides.hydra.append(f"hydra.sweep.subdir='{name}'")

    @rank_zero_only
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare the runs; a comparison that fails costs no result."""
        try:
            compare_runs(os.environ[_OUTPUT_DIR]).print()
        except (ValueError, OSError) as error:
            print(f"The runs in {os.environ[_OUTPUT_DIR]} are finished, but not compared: {error}", file=sys.stderr)


def _swept_keys(config: DictConfig) -> list[str]:
    """The keys with more than one value, from the experiment's file and from the command line."""
    declared = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*declared, *config.hydra.overrides.task])
    is_swept = {override.get_key_element().lstrip("+"): override.is_sweep_override() for override in overrides}
    return [key for key, swept in is_swept.items() if swept]


def train(config: DictConfig) -> None:
    """Train one configuration: seed, instantiate, evaluate, fit, test."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    trainer = instantiate(config.trainer, _convert_="all", callbacks=callbacks)
    if trainer.is_global_zero:
        print(f"Training {HydraConfig.get().sweep.subdir}")
    try:
        # What the network does before its first step belongs to the story; a resumed run has told it already.
        if config.ckpt_path is None and is_overridden("validation_step", model):
            trainer.validate(model, data, verbose=False)
        trainer.fit(model, data, ckpt_path=config.ckpt_path)
        if is_overridden("test_step", model):
            trainer.test(model, data)
    except ValueError:
        if trainer.global_step == 0:
            _discard_run()
        raise


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _discard_run() -> None:
    """Remove the directory of a run that never trained."""
    if _is_rank_zero():
        shutil.rmtree(HydraConfig.get().runtime.output_dir, ignore_errors=True)


def _discard_empty(directory: Path) -> None:
    """Remove the directory of a sweep without a run, and the directories above it that this leaves empty."""
    if {path.name for path in directory.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(directory)
        for parent in directory.parents:
            if parent == Path.cwd() or any(parent.iterdir()):
                return
            parent.rmdir()


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")
def _application(config: DictConfig) -> None:
    try:
        train(config)
    except (InstantiationException, ValueError, MisconfigurationException) as error:
        if isinstance(error, InstantiationException):
            _discard_run()
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, ValueError | MisconfigurationException) else error
        sys.exit(str(cause))


def main() -> None:
    """The command line."""
    # The batches come from memory: workers would only be in their way.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 with torch 2.15.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    try:
        _application()
    except SystemExit:
        directory = Path(os.environ.get(_OUTPUT_DIR, ""))
        if _OUTPUT_DIR in os.environ and directory.is_dir() and _is_rank_zero():
            _discard_empty(directory)
        raise


if __name__ == "__main__":
    main()
