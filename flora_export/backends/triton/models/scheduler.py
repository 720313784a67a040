"""The loop that gives each request its turns.

ONNX Runtime GenAI's Python calls hold the interpreter's lock, so that threads would take turns anyway. One thread therefore runs all
requests, a token of each in turn. Each has a generator of its own with its own KV cache, so that what a request gets depends on nothing
beside it: the same bits as if it were alone.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Job(Protocol):
    """One request on its way."""

    fail: Callable[[str, str], None]

    def advance(self) -> bool:
        """One turn. Returns whether the request is done."""


class Scheduler:
    """Gives jobs their turns, `slots` of them at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = threading.Semaphore(slots)
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a job over; waits for a free slot, so that whoever queues does it where the server counts them."""
        self._slots.acquire()
        self._incoming.put(job)

    def stop(self) -> None:
        """Finish the jobs that run, and no others."""
        self._incoming.put(None)
        self._thread.join()

    def _run(self) -> None:
        active: deque[Job] = deque()
        stopping = False
        while not stopping or active:
            while not stopping and (not active or not self._incoming.empty()):
                job = self._incoming.get()
                stopping = job is None
                if job is not None:
                    active.append(job)
            if not active:
                break
            job = active.popleft()
            done = True
            try:
                done = job.advance()
            except Exception as error:  # one request's failure, such as a KV cache that finds no memory, is not the others'
                traceback.print_exc()
                try:
                    job.fail(f"generation failed ({type(error).__name__}: {error})", "internal")
                except Exception:  # whoever asked cannot be told; this thread must go on
                    traceback.print_exc()
            finally:
                if done:
                    self._slots.release()
                else:
                    active.append(job)
