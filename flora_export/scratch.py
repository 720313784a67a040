"""Temporary directories of which nothing stays, though their process is killed: the next process that makes one removes those before it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary directory that holds a lock on itself. Those with its prefix that nobody has locked are of killed processes, and go.

    Args:
        prefix: of its name; what is swept has the same.
        parent: where it is made; None: where the system keeps temporary files.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        sweep(Path(tempfile.gettempdir()) if parent is None else parent, prefix)
        while True:  # another process may sweep it before it is locked
            with undisturbed():
                super().__init__(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(self.name, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if os.path.samestat(os.fstat(lock), os.stat(self.name)):
                        break
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)
            super().cleanup()
        self._unlock = weakref.finalize(self, os.close, lock)

    def cleanup(self) -> None:
        """Remove it, then let go of its lock; a signal that stops the process waits for that."""
        with undisturbed():
            super().cleanup()
            self._unlock()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended. Python handles them in its main thread alone."""
    came: list[int] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    former = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory that others may put another in the place of: whoever waited has that one.

    Raises:
        OSError: there is none.
    """
    while True:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), os.stat(directory)):
                yield
                return
        finally:
            os.close(lock)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the directories with that prefix whose lock is free."""
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
