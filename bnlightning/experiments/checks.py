"""What any run of a command would refuse, found before the first begins."""

from pathlib import Path
from textwrap import shorten

import hydra
import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from bnlightning._check import check_integer
from bnlightning.experiments import faults
from bnlightning.experiments.sweep import overrides_of, runs


def check_runs(config: DictConfig) -> None:
    """Instantiate each configuration's model and data before anything is written; seeds make no difference.

    Raises:
        ValueError: If something is not possible.
    """
    for override in overrides_of(config):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        if len(set(values)) < len(values):
            raise ValueError(faults.same_run_twice(override.input_line))
    for run in runs(config, with_seeds=False):
        _check_run(hydra.compose(config.hydra.job.config_name, overrides=run))


def _check_run(config: DictConfig) -> None:
    check_integer("seed", config.seed, at_least=0, at_most=2**32 - 1)
    if config.num_threads is not None:
        check_integer("num_threads", config.num_threads, at_least=1)
    if config.n_jobs is not None:
        check_integer("n_jobs", config.n_jobs, at_least=1)
    if not isinstance(config.resume, bool):
        raise ValueError(faults.not_a_boolean("resume", config.resume))
    for name in ("max_steps", "max_epochs"):
        if config.trainer.get(name) is not None:
            check_integer(f"trainer.{name}", config.trainer[name], at_least=-1)
    model = instantiate(config.model, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    # What is to be downloaded, once for all runs, or the message that it cannot be.
    data.prepare_data()
    if hasattr(model, "check_data"):
        model.check_data(data)
    if config.ckpt_path is not None:
        _check_checkpoint(config, model)


def _check_checkpoint(config: DictConfig, model: lightning.LightningModule) -> None:
    path = config.ckpt_path
    if not Path(path).is_file():
        raise ValueError(faults.checkpoint_is_missing(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        weights, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:
        raise ValueError(faults.checkpoint_is_damaged(path, _short(error))) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(faults.checkpoint_does_not_fit(path, config.model.get("norm"), _short(error))) from error
    last = config.trainer.max_steps
    if 0 <= last <= step:
        raise ValueError(faults.checkpoint_is_at_step(path, step, last))
    epochs, last = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], config.trainer.max_epochs
    if 0 <= last <= epochs:
        raise ValueError(faults.checkpoint_is_of_epoch(path, epochs, last))


def _short(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...") or type(error).__name__
