"""Ctrl-C and SIGTERM end a command alike: its output is cleared up, one line is said, and the exit code is 128 + the signal's number."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

STOPPED = "interrupted; the output is as it was, or whole and new"
OUT_OF_MEMORY = b"error: out of memory; what was there is as it was. Free some, or take a larger machine.\n"


class Stopped(SystemExit):
    """A signal has come. Nothing takes it for an error of its own, as libraries do with a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number, self.exit_code = number, 128 + number


@contextmanager
def stopping() -> Iterator[None]:
    """Around a command: both signals raise Stopped. A second one, while the first one's work is cleared up, ends the process at once.

    Python drops what is raised while it removes an object; there the signal is sent once more.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Stopped):
            for each in numbers:
                signal.signal(each, stop)
            later.append(threading.Timer(0.01, os.kill, (os.getpid(), dropped.exc_value.number)))
            later[-1].start()
        else:
            unraisable(dropped)

    former = {number: signal.getsignal(number) for number in numbers}
    later: list[threading.Timer] = []
    unraisable, sys.unraisablehook = sys.unraisablehook, again
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    except Stopped:  # before the command began, or after it had ended
        click.echo(f"error: {STOPPED}", err=True)
        raise
    finally:
        sys.unraisablehook = unraisable
        for timer in later:
            timer.cancel()
        for number, handler in former.items():
            signal.signal(number, handler)


class Commands(click.Group):
    """The group, with its signals handled."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, and end the process."""
        try:
            with stopping():
                return super().main(*args, **kwargs)
        except MemoryError:  # there was too little even to say so; Python's own end would have the exit code of a failed verification
            os.write(2, OUT_OF_MEMORY)
            sys.exit(3)
        except OSError as error:  # of stdout: a help text has nowhere to go
            leave_stdout()
            click.echo(f"error: stdout cannot be written ({error.strerror})", err=True)
            sys.exit(3)


def leave_stdout() -> None:
    """Let what is still to be said go nowhere: Python would fail again at its end."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
