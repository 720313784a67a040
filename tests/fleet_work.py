"""What the workers of a test's fleet do: their work, and what befalls them. In a file of its own, which workers import."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from flora_export import artifact
from flora_export.fleet.state import Outcome
from flora_export.fleet.worker import Task, do


def dies(marks: Path, task: Task) -> Outcome:
    """Kill the worker: at each attempt at `mortal`, and at the first at `two`, when all is written and nothing is in its place yet."""
    mark = marks / f"{task.job.adapter}-{len(list(marks.iterdir()))}"
    if task.job.adapter == "mortal":
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if task.job.adapter == "two" and not list(marks.glob("two-*")):
        mark.touch()

        def publish(directory: Path, output: Path) -> None:
            assert (directory / artifact.MANIFEST).is_file()
            os.kill(os.getpid(), signal.SIGKILL)

        artifact._publish = publish
    return do(task)


def ends_unheard(connection: Connection, marks: Path) -> None:
    """A driver that ends without a word: the first as it starts, the next when it has started."""
    if any(marks.iterdir()):
        connection.send(None)
    (marks / str(os.getpid())).touch()
    os._exit(1)


def hangs(connection: Connection) -> None:
    """A driver that never starts."""
    time.sleep(600)
