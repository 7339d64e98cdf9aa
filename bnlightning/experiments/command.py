"""The command line: what one command holds, and how it leads Hydra through its runs."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.experimental.callback import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf, open_dict

from bnlightning._conf import CONF_DIR
from bnlightning.compare.comparison import Draw, NotWritten
from bnlightning.compare.sweep import compare_sweep
from bnlightning.experiments import faults
from bnlightning.experiments.arguments import CONFIG_NAME, read_arguments
from bnlightning.experiments.checks import check_runs
from bnlightning.experiments.directory import OUTPUT_DIR, SweepDirectory, is_finished, make_directory, mark_finished
from bnlightning.experiments.listing import list_for_help
from bnlightning.experiments.ranks import (
    Ranks,
    agree,
    as_before,
    is_first,
    is_one_of_several,
    is_started_by_command,
    ranks_to_start,
)
from bnlightning.experiments.run import Run, name_of_run
from bnlightning.experiments.signals import Signals
from bnlightning.experiments.sweep import override_for_runs, runs, subdirectory, swept_keys
from bnlightning.experiments.workers import Workers, available_cores


def main() -> None:
    """The command line: one command, or one for each experiment that it names."""
    if is_started_by_command():
        # The arguments have been read.
        Command().run()
        return
    try:
        commands = read_arguments(sys.argv[1:])
        if len(commands) > 1 and is_one_of_several():
            raise ValueError(faults.EXPERIMENTS_ON_RANKS)
    except faults.REFUSALS_OF_A_SWEEP as error:
        # Once, whatever the number of processes.
        sys.exit(faults.message(error) if is_first() else 1)
    if len(commands) == 1:
        (sys.argv[1:],) = commands.values()
        Command().run()
    else:
        _run_each(commands)


def _run_each(commands: Mapping[str, list[str]]) -> None:
    """Run one command after another, also after one that has failed, unless somebody ends them all."""
    left, failed = list(commands), []
    for experiment, arguments in commands.items():
        left.remove(experiment)
        command = Command(experiment=experiment)
        sys.argv[1:] = arguments
        try:
            with as_before():
                command.run()
        except SystemExit as stop:
            if stop.code:
                failed.append(experiment)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr, flush=True)
        except Exception:
            failed.append(experiment)
            traceback.print_exc()
        if command.is_ended:
            break
    if failed or left:
        sys.exit(faults.experiments_missing(failed, left))


class Command:
    """One command: a sweep of one run or of many.

    Hydra's callback :class:`CompareRuns` begins and ends the sweep. Hydra's task is :meth:`do`. Where one of Hydra's
    launchers takes the task to another process, the command is a new one there that knows what is swept, no more.

    Args:
        swept: The keys of which the command gives several values.
        experiment: The experiment, if there are others.

    Attributes:
        signals: What it was told by the terminal or by a cluster.
        directory: Where it writes, on rank 0.
        workers: The processes in which its runs are trained, if not in this one.
        ranks: The processes of which each trains every run; ``None`` if this is the only one so far.
        first_job: The first run that this process trains: Lightning starts other ranks in the midst of a sweep.
    """

    running: ClassVar[ContextVar["Command"]] = ContextVar("running")
    """The command in whose :meth:`run` this is. Hydra makes its callbacks by itself, so that they have to look."""

    def __init__(self, swept: tuple[str, ...] = (), experiment: str = "") -> None:
        self.swept = swept
        self.experiment = experiment
        self._is_ended = False
        self.signals = Signals()
        self.directory: SweepDirectory | None = None
        self.workers: Workers | None = None
        self.ranks: Ranks | None = None
        self.first_job = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Command, (self.swept,)

    @property
    def is_ended(self) -> bool:
        """Whether somebody has ended it: by Ctrl-C, which Lightning turns into an exit, or by SIGTERM."""
        return self._is_ended or self.signals.interrupted

    @property
    def leads(self) -> bool:
        """Whether this process makes the directory, speaks and has the exit status."""
        return self.ranks is None or self.ranks.rank == 0

    def run(self) -> None:
        """Do what ``sys.argv`` says, from the arguments to the exit status."""
        faults.ignore_warnings()
        faults.print_anything()
        threading.excepthook = faults.thread_excepthook
        # Each command has its own directory, also where one before it in this process or shell left its.
        os.environ.pop(OUTPUT_DIR, None)
        try:
            self.ranks = Ranks.started_by_others()
        except ValueError as error:
            sys.exit(str(error))
        # conf/train.yaml's --help names them.
        OmegaConf.register_new_resolver("bnlightning.experiments", list_for_help, replace=True)
        application = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)(self.do)
        token = Command.running.set(self)
        with self.signals.answered(sigterm=self.ranks is None):
            try:
                application()
            except (SystemExit, KeyboardInterrupt) as stop:
                self._stop(stop)
            except Exception:
                # As it is with Hydra's HYDRA_FULL_ERROR.
                self._clear_up()
                raise
            finally:
                Command.running.reset(token)
                os.environ.pop(OUTPUT_DIR, None)
                if self.ranks is not None:
                    self.ranks.close()

    def begin(self, config: DictConfig) -> None:
        """Refuse what any run would refuse, make the directory, name the runs' subdirectories."""
        try:
            self.swept = swept_keys(config)
            if self.leads:
                # In multirun.yaml, where `python -m bnlightning.compare` reads them.
                OmegaConf.resolve(config.hydra.callbacks)
                check_runs(config)
            override_for_runs(config, "hydra.sweep.subdir", f"'{subdirectory(config)}'")
            if self.leads:
                self._make_directory(config)
                if self.experiment:
                    print(f"Experiment {self.experiment}", flush=True)
                self.workers = self._start_workers(config)
        except faults.REFUSALS_OF_A_SWEEP as error:
            if self.ranks is not None:
                self.ranks.tell("output_dir", "")
            sys.exit(faults.message(error))
        if not self.leads:
            self._follow(config)
        elif self.ranks is not None:
            self._tell_where(self.ranks, first_job=0)

    def end(self, config: DictConfig, metric: str, draw: Draw | None) -> None:
        """Compare the runs when all have ended; a comparison that fails costs no result."""
        if not self.leads:
            return
        if self.workers is not None:
            try:
                self.workers.wait()
            except BrokenProcessPool:
                sys.exit(faults.PROCESS_KILLED)
        directory = Path(config.hydra.sweep.dir).resolve()
        try:
            compare_sweep(directory, metric, draw).print()
        except NotWritten as error:
            error.comparison.print_tables()
            print(error, file=sys.stderr)
        except (ValueError, OSError) as error:
            print(faults.not_compared(directory, error), file=sys.stderr)

    def _make_directory(self, config: DictConfig) -> None:
        self.directory = make_directory(config)
        # For the configuration of each run, which would ask the clock again.
        os.environ[OUTPUT_DIR] = str(self.directory.path)
        with open_dict(config):
            config.hydra.sweep.dir = str(self.directory.path)

    def _start_workers(self, config: DictConfig) -> Workers | None:
        one_process = self.ranks is None and config.trainer.devices == config.trainer.num_nodes == 1
        at_most = config.n_jobs or (available_cores() if one_process else 1)
        number = min(at_most, len(runs(config)))
        return Workers(number) if number > 1 else None

    def _tell_where(self, ranks: Ranks, first_job: int) -> None:
        ranks.tell("first_job", str(first_job))
        ranks.tell("output_dir", os.environ[OUTPUT_DIR])

    def _follow(self, config: DictConfig) -> None:
        """Train in the directory that rank 0 has made, and have Hydra write nothing there."""
        assert self.ranks is not None
        directory = self.ranks.ask("output_dir")
        if not directory:
            # Rank 0 has said why.
            sys.exit(1)
        os.environ[OUTPUT_DIR] = directory
        self.first_job = int(self.ranks.ask("first_job"))
        override_for_runs(config, "hydra.output_subdir", "null")
        with open_dict(config):
            config.hydra.sweep.dir = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, config.hydra.sweep.dir, ignore_errors=True)

    def do(self, config: DictConfig) -> None:
        """Hydra's task: train one run, or hand it to a worker."""
        # Also where one of Hydra's launchers has brought this.
        faults.ignore_warnings()
        faults.print_anything()
        settings = HydraConfig.get()
        if settings.job.num < self.first_job:
            return
        # The directory of rank 0, where this one is another.
        run = Path(os.environ.get(OUTPUT_DIR, settings.sweep.dir)) / settings.sweep.subdir
        if config.resume and is_finished(run):
            if self.leads:
                print(f"Finished already: {name_of_run(config, self.swept)}", flush=True)
            return
        if self.workers is not None:
            self.workers.submit(_train_in_worker, config, HydraConfig.instance().cfg, os.getcwd(), self.swept)
            return
        error = self._train(config, settings)
        if isinstance(error, faults.REFUSALS):
            sys.exit(faults.message(error))
        if error is not None:
            raise error
        if self.leads:
            mark_finished(run)

    def _train(self, config: DictConfig, settings: Any) -> Exception | None:
        """Train with the other ranks, if there are any; what this one or, on rank 0, another one failed in."""
        if self.ranks is not None:
            self.ranks.begin(settings.job.num)
        error: Exception | None = None
        try:
            run = Run(config, self.signals, self.swept)
            in_parallel = not settings.launcher._target_.endswith(".BasicLauncher")
            self._meet_ranks(run, settings, in_parallel)
            if in_parallel:
                run.hide_progress()
            run.train()
        except Exception as own:
            error = faults.explained(own, settings.runtime.output_dir)
        # Lightning's launcher may have started the others only now.
        return error if self.ranks is None else agree(self.ranks, settings, error, self._say_what_remains)

    def _meet_ranks(self, run: Run, settings: Any, in_parallel: bool) -> None:
        """Know of the other processes before the Trainer starts them."""
        started = ranks_to_start(run.trainer, self.ranks, in_parallel)
        if started is not None:
            self.ranks = started
            started.begin(settings.job.num)
            self._tell_where(started, first_job=settings.job.num)

    def _stop(self, stop: SystemExit | KeyboardInterrupt) -> NoReturn:
        """Stop what still runs, and leave no more than was trained and a word on where it is."""
        # Lightning's answer to SIGTERM has no exit status; rank 0's is that of all.
        if isinstance(stop, KeyboardInterrupt | SIGTERMException):
            self._is_ended = True
            stop = SystemExit(1 if self.leads else 0)
        if stop.code:
            self._clear_up()
        raise stop

    def _clear_up(self) -> None:
        if self.workers is not None:
            self.workers.stop()
        if "joblib" in sys.modules:
            # Hydra's launcher leaves them training if this process alone got the signal.
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        if self.directory is not None:
            self.directory.discard()
        self._say_what_remains()

    def _say_what_remains(self) -> None:
        if self.directory is not None and self.directory.holds_runs:
            print(faults.stopped(self.directory.path, self.experiment), file=sys.stderr, flush=True)


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
        # Without one, somebody's own application has it: the sweep is the same then.
        running = Command.running.get(None)
        self._command = Command() if running is None else running

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """There is one layout of directories, that of a sweep, also of one run."""
        sys.exit(faults.RUN_MODE)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the sweep."""
        self._command.begin(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare its runs."""
        self._command.end(config, self.metric, self.draw)


def _train_in_worker(config: DictConfig, hydra_config: Any, directory: str, swept: tuple[str, ...]) -> None:
    """Train in a process that Hydra has not set up."""
    faults.ignore_warnings()
    faults.print_anything()
    setup_globals()
    HydraConfig.instance().cfg = hydra_config
    settings = hydra_config.hydra
    configure_log(settings.job_logging, settings.verbose)
    os.environ.update(settings.job.env_set)
    os.chdir(directory)
    try:
        run = Run(config, Signals(), swept, num_threads=1)
        ranks_to_start(run.trainer, None, in_parallel=True)
        run.hide_progress()
        run.train()
        mark_finished(Path(settings.runtime.output_dir))
    except Exception as error:
        explained = faults.explained(error, settings.runtime.output_dir)
        sys.exit(faults.in_a_worker(settings.sweep.subdir, explained))
