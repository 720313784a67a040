"""Ray: an actor for each worker, so that what a build imports is paid for once; a job whose worker dies is given to a new one.

All calls of Ray are made by a process of their own, the driver: Ray may end it without a word, print into it, take its signals and leave
threads behind. This process waits for what the driver says, and Ctrl-C and SIGTERM reach it at once. A cluster of this machine listens on
the loopback alone, asks for a token, reports nothing to its makers, and goes with the driver however that ends; the driver goes with this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flora_export.errors import BackendError
from flora_export.fleet.state import Outcome
from flora_export.fleet.worker import Task, Work, do
from flora_export.scratch import Scratch

STORE = 80 * 2**20  # bytes, near the least that Ray takes: nothing large goes through it
LONGEST = 24  # characters of a directory that Ray's sockets may lie in: the system allows 107 with what Ray adds
STARTS = 3  # how often it is tried to start Ray here
START_SECONDS = 120.0  # for one of them, until a worker has answered: Ray itself gives up after 30, but for where it hangs
END_SECONDS = 30.0  # for workers to be stopped; then they are killed with the driver
RETRIES = 2
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Cluster:
    """Where jobs run: at `address`, or on this machine where there is none. `workers` None: as many as there are cores."""

    address: str | None = None
    workers: int | None = None
    retries: int = RETRIES  # of a job whose worker has died


class Worker:
    """One actor. Its `work` is `do`, but in tests."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def run(self, task: Task) -> Outcome:
        return self.work(task)

    def ready(self) -> None:
        """It answers, so Ray works."""


def outcomes(tasks: Sequence[Task], cluster: Cluster, work: Work = do) -> Generator[Outcome, None, None]:
    """Do all tasks; each outcome as it comes. When this ends, however it ends, the workers are gone.

    Raises:
        BackendError: Ray is not there, does not start, there is no cluster at the address, or it has ended.
    """
    if importlib.util.find_spec("ray") is None:
        raise BackendError("a fleet needs a package that is not installed (ray): pip install 'flora-export[fleet]'")
    with ExitStack() as stack:
        place, tries, seconds = None, 1, None  # a cluster may have to start machines first
        if cluster.address is None:
            temp = Path(tempfile.gettempdir())
            place = stack.enter_context(Scratch("flora-ray-", temp if len(str(temp)) <= LONGEST else Path("/tmp")))
            tries, seconds = STARTS, START_SECONDS
        driver = started(_drive, tasks, cluster, work, place, tries=tries, seconds=seconds)
        stack.callback(driver.end)
        while (outcome := driver.said()) is not None:
            yield outcome


class Driver:
    """The process that calls Ray, from this side."""

    def __init__(self, life: Callable[..., None], *task: Any) -> None:
        self.connection, other = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=life, args=(other, *task), name="fleet")
        self.process.start()
        other.close()

    def said(self, seconds: float | None = None) -> Any:
        """What it says next. Raises BackendError: it says that it cannot, has ended without a word, or says nothing in time."""
        try:
            if not self.connection.poll(seconds):
                raise BackendError(f"Ray has not started within {seconds:.0f} s")
            item = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise BackendError(
                f"Ray has ended the fleet's driver (exit code {self.process.exitcode}). What is done is kept: run the same command again."
            ) from error
        if isinstance(item, BackendError):
            raise item
        return item

    def end(self, seconds: float = END_SECONDS) -> None:
        """Have it stop its workers, and end."""
        with contextlib.suppress(OSError):  # it has ended
            self.connection.send(None)
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        self.connection.close()


def started(*task: Any, tries: int, seconds: float | None = START_SECONDS) -> Driver:
    """A driver whose Ray is there. On a machine that is busy, Ray may need more than one try to start. Raises BackendError."""
    for left in reversed(range(tries)):
        driver = Driver(*task)
        try:
            driver.said(seconds)
        except BaseException as error:
            driver.end(0.0)
            if not left or not isinstance(error, BackendError):
                raise
        else:
            return driver
    raise AssertionError("no tries")


def _drive(connection: Connection, tasks: Sequence[Task], cluster: Cluster, work: Work, place: str | None) -> None:
    """The driver's own life: it says None when Ray is there, then each outcome, then None; anything that it hears stops it."""
    threading.Thread(target=_go_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; it is the parent's to say what they mean
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the command's answer is there, and Ray would say that a worker has died
    try:
        with ExitStack() as stack:
            ray, workers = _start(cluster, len(tasks), place, stack)
            new = partial(ray.remote(num_cpus=1, max_restarts=0)(Worker).remote, work)
            first = new()
            ray.get(first.ready.remote())
            connection.send(None)
            for outcome in _schedule(ray, tasks, workers, cluster.retries, new, [first], connection.poll):
                connection.send(outcome)
        connection.send(None)
    except BrokenPipeError:
        pass  # the parent has gone
    except BackendError as error:
        connection.send(error)
    except Exception as error:
        connection.send(BackendError(f"Ray failed ({type(error).__name__}: {' '.join(str(error).split())[:500]})"))


def _go_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start(cluster: Cluster, tasks: int, place: str | None, stack: ExitStack) -> tuple[Any, int]:
    """Ray, started or joined, and how many workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: builds that wait for whatever else a machine does
    if cluster.address is None:
        # Without this one, Ray takes 127.0.0.1 for the address by which other machines reach this one, and listens on all.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.pop("RAY_ADDRESS", None)
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(tasks, cluster.workers or cores))
    stack.callback(ray.shutdown)
    try:
        if cluster.address is not None:
            ray.init(address=cluster.address, **quiet)
            workers = max(1, min(tasks, cluster.workers or int(ray.cluster_resources().get("CPU", 1))))
        else:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))  # of each worker; else Ray gives it one
            alone = {"include_dashboard": False, "object_store_memory": STORE, "_node_ip_address": "127.0.0.1", "_temp_dir": place}
            ray.init(address="local", num_cpus=workers, **alone, **quiet)
    except Exception as error:  # Ray has many kinds, and builtin ones
        where = f"no Ray cluster answers at {cluster.address}" if cluster.address else "Ray does not start on this machine"
        raise BackendError(f"{where} ({type(error).__name__}: {str(error)[:500]})") from None  # what it is caused by may not be sent
    return ray, workers


def _schedule(
    ray: Any, tasks: Sequence[Task], workers: int, retries: int, new: Callable[[], Any], free: list[Any], stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    """Give each free worker the next task, until all are done or it is stopped. One that dies is replaced by a new one."""
    waiting, running, attempts = deque(tasks), dict[Any, tuple[Any, Task]](), Counter[str]()
    while (waiting or running) and not stopped():
        while waiting and len(running) < workers:
            actor = free.pop() if free else new()
            task = waiting.popleft()
            attempts[task.job.name] += 1
            running[actor.run.remote(task)] = (actor, task)
        done, _ = ray.wait(list(running), num_returns=1, timeout=0.2)
        for ref in done:
            actor, task = running.pop(ref)
            name = task.job.name
            try:
                outcome = ray.get(ref)
                if waiting:
                    free.append(actor)
                else:  # what has died meanwhile may wait for this one's core, where its machine has gone
                    ray.kill(actor)
            except ray.exceptions.RayError as error:
                ray.kill(actor)
                if attempts[name] <= retries and not isinstance(error, ray.exceptions.RayTaskError):
                    waiting.append(task)
                    continue
                outcome = _lost(name, error)
            yield replace(outcome, attempts=attempts[name])
    for actor in [*free, *(actor for actor, _ in running.values())]:
        ray.kill(actor)


def _lost(name: str, error: Exception) -> Outcome:
    """The outcome of a job whose workers have died, each in its turn."""
    text = " ".join(str(error).split())
    return Outcome(name, "failed", exit_code=3, error="WorkerDied", message=f"its worker died, and those that tried again ({text[:300]})")
