"""What is done to a forked child before it runs a command: each setup is one accident, or one limit, that the command then meets."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from benchmarks.campaign.forks import Run

# Audit events that change files, or are about to. `open` counts where it is for writing, a symbol where it renames (Linux's renameat2).
CHANGES = frozenset(
    [
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.truncate",
        "os.utime",
        "fcntl.flock",
        "shutil.copyfile",
        "shutil.rmtree",
    ]
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Events:
    """Counts changes of files, and acts before one of them. Python's audit hooks cannot be removed: for a child that will end."""

    def __init__(self, act_before: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.act_before, self.act = 0, act_before, act
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            counts = isinstance(args[2], int) and bool(args[2] & WRITING) and not str(args[0]).startswith(("/dev/", "/proc/"))
        elif event == "ctypes.dlsym":
            counts = args[1] == "renameat2"
        else:
            counts = event in CHANGES
        if counts:
            self.count += 1
            if self.count == self.act_before:
                self.act()


def signal_at_event(events: Events, *, event: int, delay: float = 0.0, number: int = signal.SIGKILL) -> None:
    """A signal before the n-th change of a file, or some seconds after that change began, whatever is then done."""

    def later() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), number)

    def act() -> None:
        if delay:
            threading.Thread(target=later, daemon=True).start()
        else:
            os.kill(os.getpid(), number)

    events.act_before, events.act = event, act


def file_size(events: Events, *, limit: int) -> None:
    """No file grows beyond `limit` bytes: the write that would do it fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def memory(events: Events, *, megabytes: float) -> None:
    """No more address space than there is now and `megabytes`."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = now + int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def unprivileged(events: Events) -> None:
    """Bound by the permissions of files, though it is root: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.getuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~0b110  # effective, of the lower 32: bits 1 and 2
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def clock(events: Events, *, seconds: float) -> None:
    """Python's clock is that far off."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 10**9)


def closed_pipe(events: Events) -> None:
    """Whoever reads stdout has gone, as `head -1` has."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def full_device(events: Events) -> None:
    """Stdout is a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def copies(events: Events) -> None:
    """A broken product, to see that it is found: it copies into place, file by file, where it should rename."""
    from flora_export import artifact

    def publish(directory: Path, output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(directory, output)

    artifact._publish = publish


_SETUPS = (signal_at_event, file_size, memory, unprivileged, clock, closed_pipe, full_device, copies)
SETUPS: dict[str, Callable[..., None]] = {each.__name__: each for each in _SETUPS}


def become(run: Run, log: Path, ready: int) -> NoReturn:
    """Be that command, in this process, to its end. `ready` is closed as it begins."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(file, descriptor)
            os.close(file)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        note = os.open(log / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        events = Events()
        for name, options in run.setups.items():
            SETUPS[name](events, **options)
        os.close(ready)
        time.sleep(run.start_after)
        code = _main(run.args)
        os.write(note, str(events.count).encode())
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _main(args: Any) -> int:
    from flora_export.cli import main

    try:
        main(list(args), prog_name="flora-export")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
