"""The processes of one command, which do its jobs one after another, all of them the same one at any time.

They meet in a store of torch's: it is there before the first process group, and still there when a group has broken,
which is when they have to agree.
"""

import dataclasses
import gc
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import lightning
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined, unused-ignore]

from bnlightning.experiments import faults

# Where the processes that Lightning's launcher starts find the store.
_VARIABLE = "BNLIGHTNING_STORE"
# How long a process may go on with a job after another has failed in it.
_SECONDS_TO_END = 30.0
_TIMEOUT = timedelta(minutes=30)
# What Lightning's launcher tells the processes that it starts, this one among them.
_LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a job has not been done.

    Args:
        rank: The rank that failed, or the first of several.
        reason: What it failed in, in words.
        refused: Whether the job was refused, for what the user gave.
    """

    rank: int
    reason: str
    refused: bool = False

    def __str__(self) -> str:
        return faults.rank_has_failed(self.rank, self.reason)


class Ranks:
    """This process among those of the command.

    Args:
        host: The machine on which the store is.
        port: The store's port. 0 takes a free one, on the rank that serves the store.
        rank: This process's global rank.
        world_size: The number of ranks.
        serves: Whether the store is in this process.
        prefix: What the keys begin with: the store may be somebody else's, too.
    """

    def __init__(
        self, host: str, port: int, rank: int, world_size: int, *, serves: bool = False, prefix: str = "bnlightning"
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        store = TCPStore(host, port, is_master=serves, timeout=_TIMEOUT, wait_for_workers=False)
        self.address = f"{host}:{store.port}"
        self._store: Store = PrefixStore(prefix, store)
        # A connection of its own: one that waits keeps the others of its store waiting.
        second = TCPStore(host, store.port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
        self._watched: Store = PrefixStore(prefix, second)
        self._job: int | None = None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._end_with_the_others, daemon=True)
        self._watch.start()

    @classmethod
    def started_by_others(cls) -> "Ranks | None":
        """This process among those that torchrun, srun or Lightning's launcher has started; ``None`` if it is alone.

        Raises:
            ValueError: If torchrun's agent has no store that its processes can use.
        """
        if _VARIABLE in os.environ:
            host, _, port = os.environ[_VARIABLE].rpartition(":")
            return cls(host, int(port), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
        if TorchElasticEnvironment.detect():
            environment = os.environ
            rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            if world_size == 1:
                return None
            if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                raise ValueError(faults.STORE_NEEDED)
            # The agent's store, which outlives its processes; what an earlier start of them left there is not theirs.
            prefix = f"bnlightning/{environment['TORCHELASTIC_RUN_ID']}/{environment['TORCHELASTIC_RESTART_COUNT']}"
            return cls(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), rank, world_size, prefix=prefix)
        if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
            slurm = SLURMEnvironment(auto_requeue=False)
            rank = slurm.global_rank()
            # Above those of the process groups, which Lightning takes from 15000 to 24999 by the job's number, and
            # below those that Linux hands out, from 32768 on.
            own_port = 25000 + slurm.main_port % 7500
            return cls(slurm.main_address, own_port, rank, slurm.world_size(), serves=rank == 0)
        return None

    @classmethod
    def to_be_started(cls, world_size: int) -> "Ranks":
        """Rank 0 of those that Lightning's launcher will start on this machine, which find it by the environment."""
        ranks = cls("127.0.0.1", 0, 0, world_size, serves=True)
        os.environ[_VARIABLE] = ranks.address
        # Theirs when they find that this process has gone, a page of C++ each.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return ranks

    def tell(self, key: str, value: str) -> None:
        """Give all ranks a value."""
        self._store.set(key, value)

    def ask(self, key: str) -> str:
        """Wait for what another rank tells."""
        return self._store.get(key).decode()

    def begin(self, job: int) -> None:
        """This rank begins a job."""
        self._job = job

    def fail(self, failure: Failure) -> Failure:
        """Tell that this rank has failed in its job, and return the failure of the first to do so.

        This rank leaves the process group, which makes those fail that wait for it in a collective.
        """
        key = f"{self._job}/failure"
        try:
            self._store.compare_set(key, "", json.dumps(dataclasses.asdict(failure)))
            first = Failure(**json.loads(self._store.get(key)))
        except RuntimeError:
            self._exit(f"{failure}, and {faults.RANK_0_HAS_GONE}")
        _leave_group()
        return first

    def end(self, job: int) -> Failure | None:
        """Wait until every rank has ended the job, and agree on how.

        If one has failed, all leave the process group, so that the next job begins with a new one.

        Args:
            job: The job's number.

        Returns:
            The failure of the first rank to fail; ``None`` if none did.

        Raises:
            TimeoutError: If a rank failed and another does not end the job.
        """
        if self._store.add(f"{job}/ended", 1) == self.world_size:
            self._store.set(f"{job}/all", "ended")
        pause, since = 0.01, None
        while not self._store.check([f"{job}/all"]):
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            first = self._failure(self._store, job)
            if first is None:
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > _SECONDS_TO_END:
                raise TimeoutError(faults.others_do_not_end(first))
        self._job = None
        first = self._failure(self._store, job)
        if first is not None:
            _leave_group()
            self._meet_anew(job)
        return first

    def _failure(self, store: Store, job: int) -> Failure | None:
        key = f"{job}/failure"
        return Failure(**json.loads(store.get(key))) if store.check([key]) else None

    def close(self) -> None:
        """The end of the command: nobody takes the store away while another needs it."""
        os.environ.pop(_VARIABLE, None)
        self._closing.set()
        self._watch.join()
        # Amid a job there was a signal, and the others may have been killed already.
        if self._job is not None:
            return
        with suppress(Exception):
            if self._store.add("closed", 1) == self.world_size:
                self._store.set("closed/all", "")
            self._store.wait(["closed/all"], timedelta(seconds=5))

    def _meet_anew(self, job: int) -> None:
        # The old port may still be held by what the failed job left, and the agent's store by the old group's keys.
        if self.rank == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                self.tell(f"{job}/port", str(free.getsockname()[1]))
        os.environ["MASTER_PORT"] = self.ask(f"{job}/port")
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"

    def _end_with_the_others(self) -> None:
        """End this process if it goes on with a job that another rank has failed in: a collective may never return."""
        since: dict[int, float] = {}
        while not self._closing.wait(1):
            job = self._job
            if job is None:
                continue
            try:
                failure = self._failure(self._watched, job)
            except Exception:
                # The store was in a process that has gone.
                self._give_up(faults.RANK_0_HAS_GONE, 10)
                continue
            if failure is None:
                continue
            since.setdefault(job, time.monotonic())
            if time.monotonic() - since[job] > _SECONDS_TO_END:
                self._give_up(str(failure), 5)

    def _give_up(self, reason: str, seconds: float) -> None:
        if not self._closing.wait(seconds):
            self._exit(reason)

    def _exit(self, reason: str) -> NoReturn:
        print(faults.rank_ends(self.rank, reason), file=sys.stderr, flush=True)
        # No other way leads out of a collective that never returns.
        os._exit(1)


def _leave_group() -> None:
    if distributed.is_initialized():
        with suppress(Exception):
            distributed.destroy_process_group()
    # What is left of the failed job holds its connections.
    gc.collect()


def is_started_by_command() -> bool:
    """Whether this process is a further rank of a command, started by Lightning's launcher."""
    return _VARIABLE in os.environ


def is_one_of_several() -> bool:
    """Whether torchrun or srun has started this process among others."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]) > 1
    return SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1


def is_first() -> bool:
    """Whether this process is alone or the first one of them."""
    variable = "RANK" if TorchElasticEnvironment.detect() else "SLURM_PROCID"
    return not is_one_of_several() or int(os.environ[variable]) == 0


@contextmanager
def as_before() -> Iterator[None]:
    """Leave no processes and no process group behind, so that the next command begins as the first one did."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        _leave_group()
        for variable in _LAUNCHERS:
            os.environ.pop(variable, None)
            if variable in environment:
                os.environ[variable] = environment[variable]


def ranks_to_start(trainer: lightning.Trainer, ranks: Ranks | None, in_parallel: bool) -> Ranks | None:
    """Rank 0 of the processes that the Trainer is about to start; ``None`` if it starts none.

    Args:
        trainer: That of a run, before its fit.
        ranks: The processes that there are.
        in_parallel: Whether other runs are trained at the same time.

    Raises:
        ValueError: If the Trainer is to have other processes than there are, or some that cannot be started here.
    """
    number, strategy = trainer.world_size, trainer.strategy
    if ranks is not None:
        if number != ranks.world_size:
            raise ValueError(faults.devices_are_not_processes(trainer.num_devices, trainer.num_nodes, ranks.world_size))
        return None
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    if number == 1 or environment is None:
        return None
    if environment.creates_processes_externally:
        local_rank, name = os.environ.get("LOCAL_RANK"), type(environment).__name__
        raise ValueError(faults.started_by_something_else(number, local_rank, name))
    if in_parallel:
        # Lightning starts the other ranks by repeating this process's command, which is not the user's.
        raise ValueError(faults.devices_in_parallel_runs(number))
    if trainer.num_nodes > 1:
        raise ValueError(faults.several_nodes(trainer.num_nodes))
    return Ranks.to_be_started(number)


def agree(
    ranks: Ranks, settings: Any, error: Exception | None, say_what_remains: Callable[[], None]
) -> Exception | None:
    """This rank's error or, on rank 0, another one's: what one rank fails in, all leave, for the next run.

    Args:
        ranks: Those of the command.
        settings: Hydra's, of the run.
        error: What this rank failed in; ``None`` if in nothing.
        say_what_remains: The last words of a command that may end here.
    """
    run = settings.sweep.subdir
    try:
        if error is not None:
            refused = isinstance(error, faults.REFUSALS)
            own = Failure(ranks.rank, faults.message(error) if refused else faults.reason(error), refused)
            told = "".join(traceback.format_exception(error))
            _forget_frames(error)
            # At once, since what ends the other processes may end this one; what was refused, rank 0 says in the end.
            if ranks.fail(own) == own and not own.refused:
                print(faults.of_run(run, own), file=sys.stderr, flush=True)
                if own.reason == faults.LOST:
                    say_what_remains()
                else:
                    print(told, file=sys.stderr, flush=True)
        first = ranks.end(settings.job.num)
    except TimeoutError as missing:
        print(faults.of_run(run, missing), file=sys.stderr, flush=True)
        say_what_remains()
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
