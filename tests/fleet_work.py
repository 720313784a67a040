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


def ends_a_machine(marks: Path, head: str, task: Task) -> Outcome:
    """Say on which machine of a Ray cluster this is done. Once two are at work, the one that is not the head goes with all that it has.

    The head is busy until that is known, so that what takes the place of the lost worker waits for a core.
    """
    import ray

    here, gone = ray.get_runtime_context().get_node_id(), marks / "gone"
    first = not gone.exists()
    (marks / here).touch()
    while len(list(marks.iterdir())) < 2:
        time.sleep(0.05)
    if here != head:
        gone.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if first:
        time.sleep(8)
    return Outcome(task.job.name, "built", message=here)


def ends_unheard(connection: Connection, marks: Path) -> None:
    """A driver that ends without a word: the first as it starts, the next when it has started."""
    if any(marks.iterdir()):
        connection.send(None)
    (marks / str(os.getpid())).touch()
    os._exit(1)


def hangs(connection: Connection) -> None:
    """A driver that never starts."""
    time.sleep(600)
