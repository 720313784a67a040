"""The loop that works on requests: in each turn, a part of one prompt, and one token more for every request that is answering.

One thread runs the model, so that its rows are nobody else's. A step takes all answering requests together: the weights are read once for
all of them. A prompt is read alone, a part in a turn, prompts in turn, so that a long one keeps neither answers nor other prompts waiting.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .decoding import Decoder, Logits, Row

ASK = 0.05  # seconds between two questions whether a client still waits; the server takes its time to say


class Job(Protocol):
    """One request on its way."""

    row: Row
    fail: Callable[[str, str], None]  # (message, "cancelled" or "internal")
    cancelled: Callable[[], bool]

    def take(self, logits: Logits) -> bool:
        """Go on by one token. Returns whether it is the last."""


class Scheduler:
    """Works on jobs, `slots` of them at a time."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._decoder = decoder
        self._slots = threading.Semaphore(slots)
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._reading: deque[Job] = deque()
        self._answering: dict[Row, Job] = {}
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
        stopping, asked = False, 0.0
        while not stopping or self._reading or self._answering:
            while not stopping and not (self._incoming.empty() and (self._reading or self._answering)):
                job = self._incoming.get()
                stopping = job is None
                if job is not None:
                    self._reading.append(job)
                    self._look_after(job)  # it may have waited for long
            if time.monotonic() > asked + ASK:
                asked = time.monotonic()
                for job in (*self._reading, *self._answering.values()):
                    self._look_after(job)
            if self._reading:
                self._read(self._reading.popleft())
            if self._answering:
                self._step()

    def _read(self, job: Job) -> None:
        """A part of a prompt; after the last, the first token."""
        try:
            logits = self._decoder.read(job.row)
            if logits is None:
                self._reading.append(job)
            elif job.take(logits):
                self._end(job)
            else:
                self._decoder.join(job.row)
                self._answering[job.row] = job
        except Exception as error:  # one request's failure, such as a KV cache that finds no memory, is not the others'
            self._break(job, error)

    def _step(self) -> None:
        """A token for each that is answering."""
        try:
            logits = self._decoder.step()
        except Exception as error:
            for job in list(self._answering.values()):
                self._break(job, error)
            return
        for row, scores in logits:
            job = self._answering[row]
            try:
                if job.take(scores):
                    self._end(job)
            except Exception as error:
                self._break(job, error)

    def _look_after(self, job: Job) -> None:
        """Whether somebody still waits for it."""
        try:
            if job.cancelled():
                self._end(job, "the client cancelled the request", "cancelled")
        except Exception as error:
            self._break(job, error)

    def _break(self, job: Job, error: Exception) -> None:
        traceback.print_exception(error)
        self._end(job, f"generation failed ({type(error).__name__}: {error})", "internal")

    def _end(self, job: Job, message: str = "", kind: str = "") -> None:
        """A job is over, with an error where there is a message: its row goes, and its slot comes free."""
        if self._answering.pop(job.row, None) is not None:
            self._decoder.leave(job.row)
        elif job in self._reading:
            self._reading.remove(job)
        job.row.cache = {}
        try:
            if message:
                job.fail(message, kind)
        except Exception:  # whoever asked cannot be told; this thread must go on
            traceback.print_exc()
        finally:
            self._slots.release()
