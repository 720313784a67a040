"""Work on what strangers wrote that can loop or swell (a chat template, a tokenizer's patterns), in a child that is killed in time."""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flora_export.errors import ArtifactError

SECONDS = 4.0  # of the processor
PATIENCE = 10  # times as long by the clock: a busy machine gives a process less than a core
ROOM = 2**30  # bytes that the work may take beside what the process has


def bounded(work: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """What `work` returns, which must be JSON. It runs in a fork of this process, so that nothing that it changes stays.

    Raises:
        ArtifactError: it raised, it was not done after `seconds` of computing, or it wanted more than ROOM. The message begins with `what`.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child has none of and needs none of
        child = os.fork()
    if child == 0:
        _answer(work, writing, seconds)
    os.close(writing)
    try:
        answer = _read(reading, time.monotonic() + seconds * PATIENCE)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if answer is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        raise ArtifactError(f"{what} was not done after {seconds:g} s. Does it end?")
    try:
        kind, value = json.loads(answer)
    except ValueError as error:
        raise ArtifactError(f"{what} took more than {ROOM >> 30} GiB, or ended its process ({status}).") from error
    if kind:
        raise ArtifactError(f"{what} failed ({kind}: {value})")
    return value


def _read(pipe: int, deadline: float) -> bytes | None:
    """All that comes through a pipe, or None where it does not end in time."""
    parts = []
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        parts.append(os.read(pipe, 1 << 16))
        if not parts[-1]:
            return b"".join(parts)
    return None


def _answer(work: Callable[[], Any], pipe: int, seconds: float) -> None:
    """The child: write what the work returns, or what it raised, and end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library prints as it dies
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent that tokenizers would wait for
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        limit = pages * resource.getpagesize() + ROOM if pages else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
        try:
            answer: list[Any] = ["", work()]
        except Exception as error:
            answer = [type(error).__name__, str(error)[:500]]
        with os.fdopen(pipe, "wb") as stream:
            stream.write(json.dumps(answer).encode())
    finally:
        os._exit(0)
