"""The directory of a sweep: made for one command, gone on with by another, removed if nothing came of it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from bnlightning._check import check_path
from bnlightning.compare.names import COMPARISON, EVENT_FILES, FINISHED, SWEEP_CONFIG
from bnlightning.experiments import faults
from bnlightning.experiments.sweep import override_for_runs, own_overrides, runs

OUTPUT_DIR = "BNLIGHTNING_OUTPUT_DIR"
"""The environment variable that gives the directory to the configuration of each run."""
# What a run writes does not depend on these.
_SAME_RESULTS = ("output_dir", "resume", "n_jobs", "trust_ckpt")


@dataclass(frozen=True)
class SweepDirectory:
    """A directory and what this command made of it, so that no more than that is removed if it comes to nothing.

    Args:
        path: Where the runs are.
        made: Those of it and its parents that were not there.
        before: What was in it.
    """

    path: Path
    made: list[Path]
    before: set[Path]

    @property
    def holds_runs(self) -> bool:
        """Whether one has begun to write."""
        return _holds_runs(self.path)

    def discard(self) -> None:
        """Remove what Hydra wrote for runs of which none has begun to write: its files, then directories left empty."""
        if any(self.path.rglob(EVENT_FILES)):
            return
        with suppress(OSError):
            for path in set(self.path.iterdir()) - self.before:
                if path.name == SWEEP_CONFIG:
                    path.unlink()
                    continue
                for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
                    (path / ".hydra" / name).unlink(missing_ok=True)
                (path / ".hydra").rmdir()
                path.rmdir()
            for path in self.made:
                path.rmdir()


def _holds_runs(directory: Path) -> bool:
    # Not deeper: what is there may be other sweeps.
    return any(path.parent.name != COMPARISON for path in directory.glob(f"*/{EVENT_FILES}"))


def is_finished(run: Path) -> bool:
    """Whether the run in this directory has ended by itself."""
    return (run / FINISHED).exists()


def mark_finished(run: Path) -> None:
    """The last thing that it writes."""
    (run / FINISHED).touch()


def _unfinished(config: DictConfig, directory: Path) -> list[Path]:
    """The directories that runs asked for have left there without having finished.

    Raises:
        ValueError: If a run that has finished had another configuration than it would have now, or if the checkpoint
            to train from is one of what did not finish.
    """
    loader = GlobalHydra.instance().config_loader()
    found = []
    for number, overrides in enumerate(runs(config)):
        run = loader.load_sweep_config(config, overrides)
        with open_dict(run):
            run.hydra.job.num = number
        path = directory / run.hydra.sweep.subdir
        if is_finished(path):
            _check_unchanged(path, run)
        elif _is_run(path) and directory in path.resolve().parents:
            if run.ckpt_path is not None and path.resolve() in Path(run.ckpt_path).resolve().parents:
                raise ValueError(faults.checkpoint_is_of_the_sweep(run.ckpt_path))
            found.append(path)
    return found


def _is_run(path: Path) -> bool:
    return (path / ".hydra").is_dir() or any(path.glob(EVENT_FILES))


def _check_unchanged(path: Path, config: DictConfig) -> None:
    record = path / ".hydra" / "config.yaml"
    before = _settings(OmegaConf.load(record)) if record.is_file() else {}
    # Through YAML, as what it is compared with.
    now = _settings(OmegaConf.create(OmegaConf.to_yaml(config)))
    changes = [
        f"{key}={before.get(key, 'absent')}, not {now.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if changes:
        raise ValueError(faults.resumes_another_configuration(path, changes))


def _settings(config: Any) -> dict[str, Any]:
    """What decides a run's results, by dotted key, interpolations as they are written."""
    contents: Any = OmegaConf.to_container(config)
    return dict(_leaves("", {key: value for key, value in contents.items() if key not in (*_SAME_RESULTS, "hydra")}))


def _leaves(prefix: str, contents: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in contents.items():
        if isinstance(value, dict) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _resolve_finished(directory: str, subdirectory: str) -> str | None:
    """Hydra's ``output_subdir`` in a resumed sweep: it records no configuration for a run that it does not repeat."""
    return None if is_finished(Path(directory) / subdirectory) else ".hydra"


def make_directory(config: DictConfig) -> SweepDirectory:
    """Make the directory that the configuration names, or go on with what is there.

    Raises:
        ValueError: If it cannot be written, holds runs that are not to be resumed, or those of another configuration.
    """
    check_path("output_dir", config.hydra.sweep.dir)
    directory = Path(config.hydra.sweep.dir).resolve()
    given = any(
        override.startswith(("output_dir=", "hydra.sweep.dir="))
        for override in [*config.hydra.overrides.task, *own_overrides(config)]
    )
    if config.resume and not given:
        raise ValueError(faults.RESUME_WITHOUT_DIRECTORY)
    if given and not config.resume and _holds_runs(directory):
        raise ValueError(faults.holds_runs(directory))
    unfinished = _unfinished(config, directory) if config.resume else []
    if config.resume and not _holds_runs(directory):
        print(faults.nothing_to_resume(directory), flush=True)
    directory, made = _made(directory, given)
    # From the start: what a run wrote after its last checkpoint would otherwise be there twice.
    for path in unfinished:
        shutil.rmtree(path)
    if config.resume:
        OmegaConf.register_new_resolver("bnlightning.record", _resolve_finished, replace=True)
        override_for_runs(
            config, "hydra.output_subdir", "'${bnlightning.record:${hydra.sweep.dir},${hydra.sweep.subdir}}'"
        )
    return SweepDirectory(directory, made, set(directory.iterdir()))


def _made(directory: Path, given: bool) -> tuple[Path, list[Path]]:
    """The directory, which can be written, and what was not there of it and its parents."""
    parents = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        if given:
            directory.mkdir(parents=True, exist_ok=True)
        else:
            directory = _make_exclusively(directory)
            parents = [directory, *parents[1:]]
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(faults.directory_cannot_be_written(directory, error)) from error
    return directory, parents


def _make_exclusively(directory: Path) -> Path:
    """A directory of this name, or with a number behind it if another command made one in the same second."""
    number = 1
    candidate = directory
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = directory.with_name(f"{directory.name}_{number}")
