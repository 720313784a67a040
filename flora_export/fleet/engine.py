"""Ray: an actor for each worker, so that what a build imports is paid for once; a job whose worker dies is given to a new one.

All calls of Ray are made by one thread. The main thread waits in Python alone, where Ctrl-C and SIGTERM reach it at once. A cluster of this
machine listens on the loopback alone, asks for a token, reports nothing to its makers, and goes with this process however that ends: its
processes are told by the kernel when the thread that has started them is gone.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora_export.errors import BackendError
from flora_export.fleet.state import Outcome
from flora_export.fleet.worker import Task, Work, do
from flora_export.scratch import Scratch

STORE = 80 * 2**20  # bytes, near the least that Ray takes: nothing large goes through it
LONGEST = 24  # characters of a directory that Ray's sockets may lie in: the system allows 107 with what Ray adds
STARTS = 3  # how often it is tried to start Ray, which gives up after 30 s: on a machine that is busy with other things it takes longer
RETRIES = 2
_STARTED = "started"


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


def outcomes(tasks: Sequence[Task], cluster: Cluster, work: Work = do) -> Generator[Outcome, None, None]:
    """Do all tasks; each outcome as it comes. When this ends, however it ends, the workers are gone.

    Raises:
        BackendError: Ray is not there, does not start, or there is no cluster at the address.
    """
    found: queue.SimpleQueue[Outcome | BaseException | str | None] = queue.SimpleQueue()
    stop = threading.Event()

    def drive() -> None:
        try:
            with ExitStack() as stack:
                ray, workers = _start(cluster, len(tasks), stack)
                found.put(_STARTED)
                for outcome in _schedule(ray, tasks, workers, cluster.retries, work, stop):
                    found.put(outcome)
        except BaseException as error:
            found.put(error)
        else:
            found.put(None)

    thread = threading.Thread(target=drive, name="fleet")
    thread.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Outcome):
                yield item
            else:
                _handle_signals_ourselves()
    finally:
        stop.set()
        thread.join()


def _handle_signals_ourselves() -> None:
    """Take signals back from Ray's libraries, which would print a stack before they pass one on."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _start(cluster: Cluster, tasks: int, stack: ExitStack) -> tuple[Any, int]:
    """Ray, started or joined, and how many workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if cluster.address is None:
        # Without this one, Ray takes 127.0.0.1 for the address by which other machines reach this one, and listens on all.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once in a process
        os.environ.pop("RAY_ADDRESS", None)
    try:
        import ray
    except ImportError as error:
        raise BackendError(f"a fleet needs a package that is not installed ({error}): pip install 'flora-export[fleet]'") from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(tasks, cluster.workers or cores))
    try:
        if cluster.address is not None:
            stack.callback(ray.shutdown)
            ray.init(address=cluster.address, **quiet)
            workers = max(1, min(tasks, cluster.workers or int(ray.cluster_resources().get("CPU", 1))))
        else:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))  # of each worker; else Ray gives it one
            temp = Path(tempfile.gettempdir())
            scratch = stack.enter_context(Scratch("flora-ray-", temp if len(str(temp)) <= LONGEST else Path("/tmp")))
            stack.callback(ray.shutdown)  # called before the directory goes
            alone = {"include_dashboard": False, "object_store_memory": STORE, "_node_ip_address": "127.0.0.1", "_temp_dir": scratch}
            for left in reversed(range(STARTS)):
                try:
                    ray.init(address="local", num_cpus=workers, **alone, **quiet)
                    break
                except Exception:
                    ray.shutdown()
                    if not left:
                        raise
    except Exception as error:  # Ray has many kinds, and builtin ones
        where = f"no Ray cluster answers at {cluster.address}" if cluster.address else "Ray does not start on this machine"
        raise BackendError(f"{where} ({type(error).__name__}: {str(error)[:500]})") from error
    ray._private.worker._worker_logs_enabled = False  # else it prints on stdout that a worker has died; so do we
    return ray, workers


def _schedule(ray: Any, tasks: Sequence[Task], workers: int, retries: int, work: Work, stop: threading.Event) -> Iterator[Outcome]:
    """Give each free worker the next task, until all are done or `stop` is set. A worker that dies is replaced."""
    actor_class = ray.remote(num_cpus=1, max_restarts=0)(Worker)
    waiting, running, attempts = deque(tasks), dict[Any, tuple[Any, Task]](), Counter[str]()
    free: list[Any] = []
    while (waiting or running) and not stop.is_set():
        while waiting and len(running) < workers:
            actor = free.pop() if free else actor_class.remote(work)
            task = waiting.popleft()
            attempts[task.job.name] += 1
            running[actor.run.remote(task)] = (actor, task)
        done, _ = ray.wait(list(running), num_returns=1, timeout=0.2)
        for ref in done:
            actor, task = running.pop(ref)
            name = task.job.name
            try:
                outcome = ray.get(ref)
                free.append(actor)
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
