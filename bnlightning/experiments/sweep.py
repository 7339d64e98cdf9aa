"""The runs that a command asks for, as Hydra's sweeper makes them: counted, checked, named."""

import re

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from bnlightning.compare.names import NO_VARIANT, run_directory


def overrides_of(config: DictConfig) -> list[Override]:
    """What the experiment's file and the command line set, the later of two for one key."""
    declared = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    running = GlobalHydra.instance()
    # Which options a glob stands for.
    loader = running.config_loader() if running.is_initialized() else None
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*declared, *config.hydra.overrides.task])
    return list({override.key_or_group: override for override in parsed}.values())


def runs(config: DictConfig, *, with_seeds: bool = True) -> list[list[str]]:
    """The overrides of each run, in the order of Hydra's sweeper; without seeds, of those with the first seed."""
    combinations: list[list[str]] = [[]]
    for override in overrides_of(config):
        key = override.get_key_element()
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            values = values if with_seeds or override.key_or_group != "seed" else values[:1]
        else:
            values = [override.get_value_element_as_str()]
        combinations = [[*run, f"{key}={value}"] for run in combinations for value in values]
    return combinations


def swept_keys(config: DictConfig) -> tuple[str, ...]:
    """The keys, or groups, of which the command gives several values."""
    return tuple(override.key_or_group for override in overrides_of(config) if override.is_sweep_override())


def override_for_runs(config: DictConfig, key: str, value: str) -> None:
    """Have Hydra compose each run's configuration with a value of its own, unless the command line gives one."""
    if not any(override.startswith(f"{key}=") for override in own_overrides(config)):
        config.hydra.overrides.hydra.append(f"{key}={value}")


def own_overrides(config: DictConfig) -> list[str]:
    """Those of Hydra's own configuration, as they stand: what they refer to is there in a run only."""
    overrides: list[str] = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)  # type: ignore[assignment]
    return overrides


def subdirectory(config: DictConfig) -> str:
    """A run's directory, in terms of its own configuration: the normalisation and whatever else is swept."""
    swept = [o for o in overrides_of(config) if o.is_sweep_override() and o.key_or_group != "model.norm"]
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
