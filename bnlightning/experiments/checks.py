"""What any run of a command would refuse, found before the first begins."""

import pickle
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import hydra
import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bnlightning._check import check_integer
from bnlightning.experiments import faults
from bnlightning.experiments.spelling import keys_of
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
        if override.key_or_group == "seed" and override.is_sweep_override():
            for seed in override.sweep_iterator():
                _check_seed(seed)
    for run in runs(config, with_seeds=False):
        _check_run(hydra.compose(config.hydra.job.config_name, overrides=run))


def _check_seed(seed: Any) -> None:
    check_integer("seed", seed, at_least=0, at_most=2**32 - 1)


def _check_run(config: DictConfig) -> None:
    _check_seed(config.seed)
    if config.num_threads is not None:
        check_integer("num_threads", config.num_threads, at_least=1)
    if config.n_jobs is not None:
        check_integer("n_jobs", config.n_jobs, at_least=1)
    for name in ("resume", "trust_ckpt"):
        if not isinstance(config[name], bool):
            raise ValueError(faults.not_a_boolean(name, config[name]))
    for name in ("max_steps", "max_epochs"):
        if config.trainer.get(name) is not None:
            check_integer(f"trainer.{name}", config.trainer[name], at_least=-1)
    _check_callbacks(config.callbacks)
    model = _made(config, "model")
    data = _made(config, "data")
    # What is to be downloaded, once for all runs, or the message that it cannot be.
    data.prepare_data()
    if hasattr(model, "check_data"):
        model.check_data(data)
    if config.ckpt_path is not None:
        _check_checkpoint(config, model)


def _check_callbacks(callbacks: DictConfig) -> None:
    for name, callback in callbacks.items():
        if not (isinstance(callback, DictConfig) and "_target_" in callback):
            raise ValueError(faults.no_callback(str(name)))


def _made(config: DictConfig, section: str) -> Any:
    try:
        return instantiate(config[section], _convert_="all")
    except InstantiationException as error:
        refusal = error.__cause__
        if isinstance(refusal, ValueError):
            raise ValueError(_as_typed(refusal, config, section)) from refusal
        raise


def _as_typed(refusal: ValueError, config: DictConfig, section: str) -> str:
    """A refusal of an argument, with the key that people type in the place of the argument's name."""
    name, _, rest = str(refusal).partition("=")
    contents: Any = OmegaConf.to_container(config[section], resolve=False)
    keys = [key for key in keys_of(contents) if key.rpartition(".")[2] == name]
    return f"{section}.{keys[0]}={rest}" if len(keys) == 1 else str(refusal)


def _check_checkpoint(config: DictConfig, model: lightning.LightningModule) -> None:
    path = config.ckpt_path
    if not Path(path).is_file():
        raise ValueError(faults.checkpoint_is_missing(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=not config.trust_ckpt)
        weights, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:
        if not _may_be_checkpoint(path):
            raise ValueError(faults.no_checkpoint(path)) from error
        if not config.trust_ckpt and (held := faults.code_in_checkpoint(error)):
            raise ValueError(faults.checkpoint_is_not_trusted(path, held)) from error
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


def _may_be_checkpoint(path: str) -> bool:
    """Whether the file begins like a zip archive or a pickle, which torch writes, or is empty, as a damaged one may."""
    with Path(path).open("rb") as file:
        head = file.read(2)
    return not head or head == b"PK" or head[:1] == pickle.PROTO


def _short(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...") or type(error).__name__
