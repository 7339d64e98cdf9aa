"""Every sentence that a failure is told in, and which failure is told in which.

A new sentence for something that fails while a run trains is one function here, named in :data:`_EXPLANATIONS`.
"""

import errno
import io
import os
import pickle
import re
import shlex
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

REFUSALS = (InstantiationException, ValueError, MisconfigurationException)
"""What a run raises if something that the user gave is wrong: told in one message, without a traceback."""

REFUSALS_OF_A_SWEEP = (HydraException, OmegaConfBaseException, ValueError)
"""The same of a sweep, before its first run."""

# An exception, as it is told.


def message(error: Exception) -> str:
    """One message for the user. Hydra's variable ``HYDRA_FULL_ERROR`` asks for the traceback, too."""
    if "HYDRA_FULL_ERROR" in os.environ:
        traceback.print_exception(error)
    cause = error.__cause__
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError | MisconfigurationException):
        return str(cause)
    if isinstance(cause, OmegaConfBaseException):
        return f"{error}\n{cause}"
    return str(error)


def explained(error: Exception, run: str | Path) -> Exception:
    """A refusal in one of the sentences below if one is known for the error; otherwise the error itself.

    Args:
        error: What a run raised.
        run: The run's directory.
    """
    for explain in _EXPLANATIONS:
        sentence = explain(error, run)
        if sentence is not None:
            refusal = ValueError(sentence)
            refusal.__cause__ = error
            return refusal
    return error


def _full_disk(error: Exception, run: str | Path) -> str | None:
    full = disk_error(error)
    if full is None:
        return None
    return f"{run} cannot be written ({full.strerror}): make room there, or give another output_dir=PATH."


def _no_gpu(error: Exception, run: str | Path) -> str | None:
    if "No supported gpu backend" not in str(error.__cause__):
        return None
    return "trainer.accelerator='gpu' is not possible: no GPU is found. Give trainer=cpu or trainer=ddp_cpu."


_EXPLANATIONS: tuple[Callable[[Exception, str | Path], str | None], ...] = (_full_disk, _no_gpu)


def disk_error(error: BaseException | None) -> OSError | None:
    """The error among an error's causes that says that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__
    return None


LOST = (
    "another rank's process or its connection has gone: it may have been killed, for want of memory or by the cluster"
)
"""What a rank says if another one has gone without a word."""


def reason(error: Exception) -> str:
    """What the other ranks are told of an error."""
    said = f"{type(error).__name__}: {message(error)}"
    return LOST if re.search("by peer|remote process", said) else said


def amid_the_run(error: ValueError) -> str:
    """A ``ValueError`` after the first batch is no fault of the configuration."""
    return f"{type(error).__name__} amid the run: {error}"


def cannot_be_logged(tag: str, value: object) -> str:
    """The module logged something else than a number."""
    return f"{tag}={value!r} cannot be logged: log a number, or a tensor of one."


def in_a_worker(run: str, error: Exception) -> str:
    """What the process of one of several runs at the same time ends with."""
    if isinstance(error, REFUSALS):
        return f"{run}: {message(error)}"
    return f"{run}: {type(error).__name__}: {message(error)} (n_jobs=1 shows the traceback.)"


def thread_excepthook(arguments: threading.ExceptHookArgs) -> None:
    """Say nothing of a disk that is full: TensorBoard's thread meets it first, the main thread tells it."""
    if disk_error(arguments.exc_value) is None:
        threading.__excepthook__(arguments)


def print_anything() -> None:
    """Have no character end a command for which the standard output has no code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def ignore_warnings() -> None:
    """Leave out the warnings that say nothing to who gave the command."""
    # Lightning 2.6 with torch 2.15.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # The comparison tells which runs diverged, where and when.
    warnings.filterwarnings("ignore", message="ActivationMonitor: at step .* the first NaN")
    # A checkpoint to resume from is another run's.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # The variant without batch normalisation has the monitors of the others.
    warnings.filterwarnings("ignore", message="BatchNormMonitor.modules=None. finds nothing to watch")


# What is typed.


def misspelt(word: str, *spellings: str) -> str:
    """A word that is no ``key=value``."""
    if spellings:
        return f"{word!r} is not understood: type {' or '.join(spellings)}."
    return f"{word!r} is not understood: type KEY=VALUE, such as experiment=tanh. {_KEYS_ARE_LISTED}"


def unknown(what: str, like: Sequence[str], known: Sequence[str] = ()) -> str:
    """There is no such key, group or option."""
    meant = f"Did you mean {' or '.join(like)}? " if like else ""
    there = f"Choose one of {', '.join(known)}." if known else _KEYS_ARE_LISTED
    return f"{what} is not known. {meant}{there}"


def given_twice(group: str, names: Sequence[str]) -> str:
    """A group that several words choose from."""
    if group.startswith("hydra/"):
        return f"{group} is given twice: give it once."
    return f"{group} is given twice: type {group}={','.join(names)}."


def decimal_comma(line: str, first: str, second: str) -> str:
    """A comma where a decimal point is meant."""
    return (
        f"{line} is not possible: a comma makes a list, here of {first} and {second}. "
        f"Decimals take a point: {first}.{second}."
    )


def is_a_list(key: str, value: Any) -> str:
    """Brackets make one value of several."""
    if isinstance(value, Mapping):
        return f"{key}={_as_typed(value)} is not possible: give one value, without braces."
    values = ",".join(_as_typed(each) for each in value)
    return (
        f"{key}=[{values}] is not possible: brackets make a list, which is one value. "
        f"Leave them out to train with each: {key}={values}."
    )


def assigned(key: str, value: Any) -> str:
    """A value of a key as it is typed."""
    return f"{key}={_as_typed(value)}"


def does_not_fit(key: str, value: Any, wanted: str) -> str:
    """A value of another type."""
    return f"{key}={_as_typed(value)} is not possible: give {wanted}."


def cannot_be_left_out(line: str) -> str:
    """Every run needs it."""
    return f"{line} is not possible: every run needs it. Give another value instead."


def of_the_command(line: str, key: str) -> str:
    """A sweep over what all runs share."""
    return f"{line} is not possible: {key} is one for all runs of a command. Give one value."


def hydras_own(line: str, cure: str) -> str:
    """A setting of Hydra's that has no place here."""
    return f"{line} is not possible: {cure}."


def cannot_be_read(word: str, why: str) -> str:
    """Hydra's grammar does not have it."""
    first = why.splitlines()[0]
    return f"{word} cannot be read ({first}): quote a value with special characters twice, \"key='value'\"."


def config_dir_is_missing(path: str) -> str:
    """There is no such directory."""
    return f"--config-dir={path} is not a directory: give the one that holds your configuration files."


def options_exclude_each_other(options: Sequence[str]) -> str:
    """Two ways to use the command at once."""
    return f"{' and '.join(options)} are not possible together: give one of them."


def shows_one_configuration(line: str) -> str:
    """--cfg with a sweep."""
    return f"{line} is not possible with --cfg and --info, which show one configuration: give one value."


RESOLVE_WITHOUT_CFG = "--resolve is not possible without --cfg: give --cfg job --resolve."
CONFIG_PATH = "--config-path is not possible: give --config-dir, which adds your files to the command's own."
RERUN = "--experimental-rerun is not possible: give resume=true output_dir=PATH to go on with a sweep."
_KEYS_ARE_LISTED = "--help lists what people change most, --cfg job all keys."


def _as_typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_as_typed(each) for each in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_as_typed(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# What is refused before any run.

RUN_MODE = "hydra.mode=RUN is not possible: leave it out, a single run is a sweep of one."


def same_run_twice(override: str | None) -> str:
    """Two values of a sweep are equal."""
    return f"{override} would train the same run twice: give each value once."


def not_a_boolean(name: str, value: Any) -> str:
    """Neither true nor false."""
    return f"{name}={value!r} is not possible: give true or false."


def no_callback(name: str) -> str:
    """An entry of ``callbacks`` that is not made by anything."""
    return f"callbacks.{name} is no callback: name its class, +callbacks.{name}._target_=CLASS, or ~callbacks.{name}."


def checkpoint_is_missing(path: str) -> str:
    """There is no such file."""
    return f"ckpt_path={path!r} is not a file: give a checkpoint, such as checkpoints/last.ckpt of a run."


def no_checkpoint(path: str) -> str:
    """A file of another kind."""
    return f"ckpt_path={path!r} is no checkpoint: give one, such as checkpoints/last.ckpt of a run."


def checkpoint_is_damaged(path: str, why: str) -> str:
    """The file cannot be read."""
    return f"ckpt_path={path!r} is no checkpoint of Lightning's, or a damaged one ({why}): give another."


def code_in_checkpoint(error: Exception) -> str:
    """What a checkpoint holds beside data, by the error of torch that would not run it; empty for another error."""
    if not isinstance(error, pickle.UnpicklingError) or "arbitrary code execution" not in str(error):
        return ""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else "something that torch does not know"


def checkpoint_is_not_trusted(path: str, held: str) -> str:
    """The file is not data only."""
    return (
        f"ckpt_path={path!r} holds more than numbers and texts ({held}), so that reading it could run code: "
        "give trust_ckpt=true if you trust who wrote it, or another."
    )


def checkpoint_does_not_fit(path: str, norm: str | None, why: str) -> str:
    """The weights are those of another model."""
    return (
        f"ckpt_path={path!r} does not fit the model with norm={norm!r}: give a checkpoint of "
        f"this model, or the checkpoint's own arguments, such as model.norm=custom ({why})."
    )


def checkpoint_is_at_step(path: str, step: int, last: int) -> str:
    """There is no step left to train."""
    return f"ckpt_path={path!r} is at step {step} already: give trainer.max_steps above it, not {last}."


def checkpoint_is_of_epoch(path: str, epochs: int, last: int) -> str:
    """There is no epoch left to train."""
    return f"ckpt_path={path!r} is of {epochs} epoch(s) already: give trainer.max_epochs above it, not {last}."


def checkpoint_is_of_the_sweep(path: str) -> str:
    """Resuming removes the run that the checkpoint is of."""
    return f"ckpt_path={path!r} is of a run that resume=true begins again: copy it first."


# Directories.

RESUME_WITHOUT_DIRECTORY = "resume=true needs to know which sweep: give its directory, output_dir=PATH."


def resumes_another_configuration(run: Path, changes: Sequence[str]) -> str:
    """A run that has finished was trained with other settings."""
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return (
        f"resume=true is not possible: {str(run)!r} finished with {'; '.join(changes[:3])}{more}. "
        "Give what it was trained with, or another output_dir."
    )


def holds_runs(directory: Path) -> str:
    """Another sweep is there."""
    return (
        f"output_dir={str(directory)!r} holds runs already: give another, remove them, "
        "or give resume=true, which trains only what has not finished."
    )


def nothing_to_resume(directory: Path) -> str:
    """No failure, but perhaps not what was meant."""
    return f"Nothing to resume in {directory}: all runs are trained."


def directory_cannot_be_written(directory: Path, error: OSError) -> str:
    """It cannot be made, or no file in it."""
    return f"output_dir={str(directory)!r} cannot be written ({error.strerror}): give another, output_dir=PATH."


# Several processes.

STORE_NEEDED = (
    "torchrun without a store of its agent's is not possible: give it --rdzv-backend=static or c10d, "
    "and do not set TORCH_DISABLE_SHARE_RDZV_TCP_STORE."
)
PROCESS_KILLED = "A run's process was killed, perhaps for want of memory: give a smaller n_jobs, and resume=true."
RANK_0_HAS_GONE = "the process of rank 0 has gone"


def devices_are_not_processes(devices: int, nodes: int, processes: int) -> str:
    """Something has started another number of processes than the Trainer is to have."""
    return (
        f"trainer.devices={devices} with trainer.num_nodes={nodes} is not possible in {processes} processes: "
        "give as many devices as processes, with trainer=ddp or trainer=ddp_cpu, and runs of other numbers a command "
        "of their own."
    )


def started_by_something_else(processes: int, local_rank: str | None, environment: str) -> str:
    """Lightning takes this process for one of several, which this command does not know."""
    return (
        f"{processes} processes that something else has started are not possible (LOCAL_RANK={local_rank}, "
        f"{environment}): start them by torchrun, by srun or, without these variables, by this command alone."
    )


def devices_in_parallel_runs(processes: int) -> str:
    """Lightning's launcher would repeat a command that is not the user's."""
    return f"n_jobs above 1 is not possible with {processes} devices a run: give n_jobs=1."


def several_nodes(nodes: int) -> str:
    """Lightning's launcher starts processes on one machine only."""
    return f"trainer.num_nodes={nodes} is not possible with one command: start it on every machine by torchrun or srun."


def rank_has_failed(rank: int, why: str) -> str:
    """One rank's failure, told on any."""
    return f"rank {rank} has failed ({why})"


def others_do_not_end(failure: object) -> str:
    """Some rank still waits in a collective."""
    return f"{failure}, and others do not end"


def rank_ends(rank: int, why: object) -> str:
    """The last words of a process that nothing else can lead out of a collective."""
    return f"Rank {rank} ends: {why}."


def of_run(run: str, what: object) -> str:
    """What happened, and in which run."""
    return f"{run}: {what}"


# Several experiments.

EXPERIMENTS_ON_RANKS = "With torchrun and srun one experiment is possible: give each a command of its own."


def experiments_missing(failed: Sequence[str], left: Sequence[str]) -> str:
    """Some of them failed or were not begun."""
    told = [f"{', '.join(names)} {what}" for names, what in ((failed, "failed"), (left, "not begun")) if names]
    return f"Experiments: {'; '.join(told)}."


# The end of the command.


def not_compared(directory: Path, error: Exception) -> str:
    """No run is lost by it."""
    return f"The runs in {directory} are finished, but not compared: {error}"


def stopped(directory: Path, experiment: str = "") -> str:
    """The command has ended before its last run, and this is how to go on.

    Args:
        directory: Where the runs are.
        experiment: The experiment, if the command has several.
    """
    path = shlex.quote(str(directory))
    which = f"experiment={experiment} " if experiment else ""
    return (
        f"Stopped. What was trained so far: python -m bnlightning.compare {path}\n"
        f"To train the rest: the same command with {which}resume=true output_dir={path}"
    )
