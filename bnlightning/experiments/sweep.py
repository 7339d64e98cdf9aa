"""The runs that a command asks for, as Hydra's sweeper makes them: counted, checked, named."""

import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import hydra
import lightning
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bnlightning._check import check_integer
from bnlightning.compare.names import NO_VARIANT, run_directory


def _overrides(config: DictConfig) -> list[Override]:
    """What the experiment's file and the command line set, the later of two for one key."""
    declared = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*declared, *config.hydra.overrides.task])
    return list({override.key_or_group: override for override in parsed}.values())


def runs(config: DictConfig, *, with_seeds: bool = True) -> list[list[str]]:
    """The overrides of each run, in the order of Hydra's sweeper; without seeds, of those with the first seed."""
    combinations: list[list[str]] = [[]]
    for override in _overrides(config):
        key = override.get_key_element()
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            values = values if with_seeds or override.key_or_group != "seed" else values[:1]
        else:
            values = [override.get_value_element_as_str()]
        combinations = [[*run, f"{key}={value}"] for run in combinations for value in values]
    return combinations


def override_for_runs(config: DictConfig, key: str, value: str) -> None:
    """Have Hydra compose each run's configuration with a value of its own, unless the command line gives one."""
    if not any(override.startswith(f"{key}=") for override in own_overrides(config)):
        config.hydra.overrides.hydra.append(f"{key}={value}")


def own_overrides(config: DictConfig) -> list[str]:
    """Those of Hydra's own configuration, as they stand: what they refer to is there in a run only."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    return overrides


def check_runs(config: DictConfig) -> None:
    """Instantiate each configuration's model and data before anything is written; seeds make no difference.

    Raises:
        ValueError: If something is not possible.
    """
    for override in _overrides(config):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        if len(set(values)) < len(values):
            raise ValueError(f"{override.input_line} would train the same run twice: give each value once.")
    for run in runs(config, with_seeds=False):
        _check_run(hydra.compose(config.hydra.job.config_name, overrides=run))


def _check_run(config: DictConfig) -> None:
    check_integer("seed", config.seed, at_least=0, at_most=2**32 - 1)
    if config.num_threads is not None:
        check_integer("num_threads", config.num_threads, at_least=1)
    if config.n_jobs is not None:
        check_integer("n_jobs", config.n_jobs, at_least=1)
    if not isinstance(config.resume, bool):
        raise ValueError(f"resume={config.resume!r} is not possible: give true or false.")
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
        raise ValueError(
            f"ckpt_path={path!r} is not a file: give a checkpoint, such as checkpoints/last.ckpt of a run."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        weights, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:
        raise ValueError(
            f"ckpt_path={path!r} is no checkpoint of Lightning's, or a damaged one ({_short(error)}): give another."
        ) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"ckpt_path={path!r} does not fit the model with norm={config.model.get('norm')!r}: give a checkpoint of "
            f"this model, or the checkpoint's own arguments, such as model.norm=custom ({_short(error)})."
        ) from error
    last = config.trainer.max_steps
    if 0 <= last <= step:
        raise ValueError(f"ckpt_path={path!r} is at step {step} already: give trainer.max_steps above it, not {last}.")
    epochs, last = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], config.trainer.max_epochs
    if 0 <= last <= epochs:
        raise ValueError(
            f"ckpt_path={path!r} is of {epochs} epoch(s) already: give trainer.max_epochs above it, not {last}."
        )


def _short(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def subdirectory(config: DictConfig) -> str:
    """A run's directory, in terms of its own configuration: the normalisation and whatever else is swept."""
    swept = [o for o in _overrides(config) if o.is_sweep_override() and o.key_or_group != "model.norm"]
    last = [override.key_or_group.split(".")[-1] for override in swept]
    settings = {}
    for override, short in zip(swept, last, strict=True):
        key = override.key_or_group
        label = short if last.count(short) == 1 else key
        values = list(override.sweep_string_iterator())
        if GlobalHydra.instance().config_loader().get_group_options(key):
            settings[label] = f"${{hydra.runtime.choices.{key}}}"
        elif all(re.fullmatch(r"[\w.+-]{1,60}", value) for value in values):
            settings[label] = f"${{{key}}}"
        else:
            # Values that make no name, such as lists and paths.
            settings["job"] = "${hydra.job.num}"
    return run_directory(f"${{oc.select:model.norm,{NO_VARIANT}}}", settings)
