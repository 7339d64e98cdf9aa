"""The application: ``python -m bnlightning.train +experiment=tanh``."""

import atexit
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bnlightning._conf import CONF_DIR
from bnlightning.compare.__main__ import Draw, compare_sweep
from bnlightning.experiments.checks import check_runs
from bnlightning.experiments.directory import SweepDirectory, is_finished, make_directory, mark_finished
from bnlightning.experiments.faults import LOST, REFUSALS, excepthook, full_disk, ignore_warnings, message, reason
from bnlightning.experiments.ranks import Failure, Ranks
from bnlightning.experiments.sweep import override_for_runs, runs, subdirectory
from bnlightning.experiments.workers import Workers, available_cores

# What rank 0 made of the clock, for the configuration of each run.
_OUTPUT_DIR = "BNLIGHTNING_OUTPUT_DIR"
# torch's own choice, or a worker's.
_NUM_THREADS = torch.get_num_threads()


def train(config: DictConfig, *, in_parallel: bool = False) -> None:
    """Train one configuration: seed, instantiate, evaluate, fit, test.

    Args:
        config: The composed configuration.
        in_parallel: Whether others are trained at the same time, whose progress bars would overwrite this one's.

    Raises:
        ValueError: If something of the configuration is not possible, such as several devices while others are trained
            at the same time, or another number of processes than there are.
        RuntimeError: In the place of a ``ValueError`` once a batch has been taken: no fault of the configuration.
    """
    torch.set_num_threads(config.num_threads or _NUM_THREADS)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    progress = _Progress()
    callbacks = [*instantiate(config.callbacks, _convert_="all").values(), progress]
    trainer = instantiate(config.trainer, _convert_="all", callbacks=callbacks)
    _join(trainer, in_parallel)
    if in_parallel and trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()
    if trainer.is_global_zero:
        threads = torch.get_num_threads()
        print(f"Training {HydraConfig.get().sweep.subdir} on {threads} thread{'s' * (threads > 1)}", flush=True)
    try:
        _evaluate_and_fit(trainer, model, data, config.ckpt_path, progress)
    except ValueError as error:
        if progress.has_begun:
            raise RuntimeError(f"{type(error).__name__} amid the run: {error}") from error
        raise


def _evaluate_and_fit(
    trainer: lightning.Trainer,
    model: lightning.LightningModule,
    data: lightning.LightningDataModule,
    ckpt_path: str | None,
    progress: "_Progress",
) -> None:
    evaluates = is_overridden("validation_step", model)
    # What the network does before its first step belongs to the story; a resumed run has told it already.
    if evaluates and ckpt_path is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Evaluation with running statistics that no batch has updated")
            trainer.validate(model, data, verbose=False)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if evaluates and progress.evaluated_at != trainer.global_step:
        trainer.validate(model, data, verbose=False)
    if is_overridden("test_step", model):
        trainer.test(model, data, verbose=False)


def _join(trainer: lightning.Trainer, in_parallel: bool) -> None:
    """Know of the other processes before the Trainer starts them."""
    global _ranks
    number, strategy = trainer.world_size, trainer.strategy
    if _ranks is not None and number != _ranks.world_size:
        raise ValueError(
            f"trainer.devices={trainer.num_devices} with trainer.num_nodes={trainer.num_nodes} is not possible in "
            f"{_ranks.world_size} processes: give as many devices as processes, with trainer=ddp or trainer=ddp_cpu, "
            "and runs of other numbers a command of their own."
        )
    if _ranks is not None or number == 1 or not isinstance(strategy, ParallelStrategy):
        return
    environment = strategy.cluster_environment
    if environment is None:
        return
    if environment.creates_processes_externally:
        raise ValueError(
            f"{number} processes that something else has started are not possible (LOCAL_RANK="
            f"{os.environ.get('LOCAL_RANK')}, {type(environment).__name__}): start them by torchrun, by srun or, "
            "without these variables, by this command alone."
        )
    if in_parallel:
        # Lightning starts the other ranks by repeating this process's command, which is not the user's.
        raise ValueError(f"n_jobs above 1 is not possible with {number} devices a run: give n_jobs=1.")
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} is not possible with one command: start it on every machine by "
            "torchrun or srun."
        )
    _ranks = Ranks.to_be_started(number)
    _ranks.begin(HydraConfig.get().job.num)
    _ranks.tell("output_dir", os.environ[_OUTPUT_DIR])
    _ranks.tell("first_job", str(HydraConfig.get().job.num))


class _Progress(lightning.Callback):
    """How far a run has come."""

    has_begun = False
    evaluated_at: int | None = None

    def on_validation_batch_start(self, *_: Any) -> None:
        self._begin()

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin()

    def on_test_batch_start(self, *_: Any) -> None:
        self._begin()

    def _begin(self) -> None:
        self.has_begun = True
        # An exception that a signal's handler raises is lost where the interpreter collects garbage.
        if _interrupted:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.evaluated_at = trainer.global_step


class CompareRuns(Callback):
    """Hydra's callback around a sweep: checks and one directory before it, one comparison after it.

    Args:
        metric: The tag that :func:`~bnlightning.compare_runs` compares by.
        draw: What draws its figure; ``None``: the default one. In YAML a function and its options, such as
            ``{_target_: bnlightning.compare.figures.draw_parameter, _partial_: true, parameter: learning_rate}``.
    """

    def __init__(self, metric: str = "val/loss", draw: Draw | None = None) -> None:
        self.metric = metric
        self.draw = draw

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """There is one layout of directories, that of a sweep, also of one run."""
        sys.exit("hydra.mode=RUN is not possible: leave it out, a single run is a sweep of one.")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what any run would refuse, make the directory, name the runs' subdirectories."""
        global _directory, _workers
        begins = _ranks is None or _ranks.rank == 0
        try:
            if begins:
                # In multirun.yaml, where `python -m bnlightning.compare` reads them.
                OmegaConf.resolve(config.hydra.callbacks)
                check_runs(config)
            override_for_runs(config, "hydra.sweep.subdir", f"'{subdirectory(config)}'")
            if begins:
                _directory = make_directory(config)
                os.environ[_OUTPUT_DIR] = str(_directory.path)
                with open_dict(config):
                    config.hydra.sweep.dir = str(_directory.path)
                _workers = _start_workers(config)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if _ranks is not None:
                _ranks.tell("output_dir", "")
            sys.exit(message(error))
        if not begins:
            _leave_files_to_rank_0(config)
        elif _ranks is not None:
            _ranks.tell("first_job", "0")
            _ranks.tell("output_dir", os.environ[_OUTPUT_DIR])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare the runs when all have ended; a comparison that fails costs no result."""
        if _ranks is not None and _ranks.rank > 0:
            return
        if _workers is not None:
            _wait(_workers)
        directory = Path(config.hydra.sweep.dir).resolve()
        try:
            compare_sweep(directory, self.metric, self.draw).print()
        except (ValueError, OSError) as error:
            print(f"The runs in {directory} are finished, but not compared: {error}", file=sys.stderr)


def _leave_files_to_rank_0(config: DictConfig) -> None:
    """Train in the directory that it has made, and have Hydra write nothing there."""
    global _first_job
    assert _ranks is not None
    directory = _ranks.ask("output_dir")
    if not directory:
        # Rank 0 has said why.
        sys.exit(1)
    os.environ[_OUTPUT_DIR] = directory
    _first_job = int(_ranks.ask("first_job"))
    override_for_runs(config, "hydra.output_subdir", "null")
    with open_dict(config):
        config.hydra.sweep.dir = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, config.hydra.sweep.dir, ignore_errors=True)


_directory: SweepDirectory | None = None
# Where the runs are trained, if not here.
_workers: Workers | None = None
# The processes of which each trains every run, from one on.
_ranks: Ranks | None = None
_first_job = 0
_interrupted = False


def _start_workers(config: DictConfig) -> Workers | None:
    one_process = _ranks is None and config.trainer.devices == config.trainer.num_nodes == 1
    at_most = config.n_jobs or (available_cores() if one_process else 1)
    number = min(at_most, len(runs(config)))
    return Workers(number) if number > 1 else None


def _wait(workers: Workers) -> None:
    try:
        workers.wait()
    except BrokenProcessPool:
        sys.exit("A run's process was killed, perhaps for want of memory: give a smaller n_jobs, and resume=true.")


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")
def _application(config: DictConfig) -> None:
    # Also where one of Hydra's launchers has brought this.
    ignore_warnings()
    settings = HydraConfig.get()
    if settings.job.num < _first_job:
        return
    # The directory of rank 0, where this one is another.
    run = Path(os.environ.get(_OUTPUT_DIR, settings.sweep.dir)) / settings.sweep.subdir
    if config.resume and is_finished(run):
        if _ranks is None or _ranks.rank == 0:
            print(f"Finished already: {settings.sweep.subdir}", flush=True)
        return
    if _workers is not None:
        _workers.submit(_train_in_worker, config, HydraConfig.instance().cfg, os.getcwd())
        return
    error = _train_in_step(config, settings)
    if isinstance(error, REFUSALS):
        sys.exit(message(error))
    if error is not None:
        raise error
    if _ranks is None or _ranks.rank == 0:
        mark_finished(run)


def _train_in_step(config: DictConfig, settings: Any) -> Exception | None:
    """Train with the other ranks, if there are any; what this one or, on rank 0, another one failed in."""
    if _ranks is not None:
        _ranks.begin(settings.job.num)
    error: Exception | None = None
    try:
        train(config, in_parallel=not settings.launcher._target_.endswith(".BasicLauncher"))
    except Exception as own:
        error = _told_of_full_disk(own)
    # Lightning's launcher may have started the others only now.
    return error if _ranks is None else _agree(_ranks, settings, error)


def _told_of_full_disk(error: Exception) -> Exception:
    full = full_disk(error)
    if full is None:
        return error
    path = HydraConfig.get().runtime.output_dir
    return ValueError(f"{path} cannot be written ({full.strerror}): make room there, or give another output_dir=PATH.")


def _agree(ranks: Ranks, settings: Any, error: Exception | None) -> Exception | None:
    """This rank's error or, on rank 0, another one's: what one rank fails in, all leave, for the next run."""
    try:
        if error is not None:
            refused = isinstance(error, REFUSALS)
            own = Failure(ranks.rank, message(error) if refused else reason(error), refused)
            told = "".join(traceback.format_exception(error))
            _forget_frames(error)
            # At once, since what ends the other processes may end this one; what was refused, rank 0 says in the end.
            if ranks.fail(own) == own and not own.refused:
                print(f"{settings.sweep.subdir}: {own}", file=sys.stderr, flush=True)
                if own.reason == LOST:
                    _say_what_remains()
                else:
                    print(told, file=sys.stderr, flush=True)
        first = ranks.end(settings.job.num)
    except TimeoutError as missing:
        print(f"{settings.sweep.subdir}: {missing}", file=sys.stderr, flush=True)
        _say_what_remains()
        os._exit(1)
    if first is None:
        return None
    if ranks.rank > 0:
        # Rank 0 has the exit status of all: Lightning kills it if another's is not 0.
        if first.refused:
            sys.exit(0)
        return None
    if first.rank == 0:
        return error
    return ValueError(first.reason) if first.refused else RuntimeError(str(first))


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what a failed run holds: its process group, for which others wait, is not left before."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _train_in_worker(config: DictConfig, hydra_config: Any, directory: str) -> None:
    """Train in a process that Hydra has not set up."""
    ignore_warnings()
    setup_globals()
    HydraConfig.instance().cfg = hydra_config
    settings = hydra_config.hydra
    configure_log(settings.job_logging, settings.verbose)
    os.environ.update(settings.job.env_set)
    os.chdir(directory)
    try:
        train(config, in_parallel=True)
        mark_finished(Path(settings.runtime.output_dir))
    except REFUSALS as error:
        sys.exit(f"{settings.sweep.subdir}: {message(error)}")
    except Exception as error:
        sys.exit(f"{settings.sweep.subdir}: {type(error).__name__}: {message(error)} (n_jobs=1 shows the traceback.)")


def main() -> None:
    """The command line."""
    global _interrupted, _ranks
    _interrupted = False
    ignore_warnings()
    threading.excepthook = excepthook
    # Each command has its own directory, also where one before it in this process or shell left its.
    os.environ.pop(_OUTPUT_DIR, None)
    try:
        _ranks = Ranks.started_by_others()
    except ValueError as error:
        sys.exit(str(error))
    before = _answer_signals()
    try:
        _application()
    except (SystemExit, KeyboardInterrupt) as stop:
        _end(stop)
    except Exception:
        # As it is with Hydra's HYDRA_FULL_ERROR.
        _clear_up()
        raise
    finally:
        os.environ.pop(_OUTPUT_DIR, None)
        if _ranks is not None:
            _ranks.close()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _answer_signals() -> dict[int, Any]:
    """Have signals end this command, and return what answered them before; nothing where they are to be ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # One that waits for others in torch would not hear it.
    if _ranks is None and before[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    return before


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C, and SIGTERM outside of what a callback answers: by an exception, so that nothing is left behind."""
    global _interrupted
    _interrupted = True
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(stop: SystemExit | KeyboardInterrupt) -> None:
    """Stop what still runs, and leave no more than was trained and a word on where it is."""
    # Lightning's answer to SIGTERM has no exit status; rank 0's is that of all.
    if isinstance(stop, KeyboardInterrupt | SIGTERMException):
        stop = SystemExit(1 if _ranks is None or _ranks.rank == 0 else 0)
    if stop.code:
        _clear_up()
    raise stop


def _clear_up() -> None:
    if _workers is not None:
        _workers.stop()
    if "joblib" in sys.modules:
        # Hydra's launcher leaves them training if this process alone got the signal.
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True, kill_workers=True)
    if _directory is not None:
        _directory.discard()
        _say_what_remains()


def _say_what_remains() -> None:
    if _directory is not None and _directory.holds_runs:
        directory = shlex.quote(str(_directory.path))
        print(f"Stopped. What was trained so far: python -m bnlightning.compare {directory}", file=sys.stderr)
        print(
            f"To train the rest: the same command with resume=true output_dir={directory}", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    # Hydra's callback is of the imported module: so are the command's state and functions, then.
    from bnlightning.train import main as imported_main

    imported_main()
