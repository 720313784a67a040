"""What must not happen while a stranger's file is read: too long, too much memory, a file outside, a program, code, the network."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 5  # of the processor
PATIENCE = 10  # times as long by the clock: a busy machine gives a process less than a core
GROWTH = 2**30  # bytes that reading one small file may add to the process
ROOM = 4 * 2**30  # of addresses, beyond what the process has when it begins
# Packages that our readers import when they need them. A stranger's file that names another module to be imported is a loss.
PACKAGES = {
    "accelerate", "benchmarks", "click", "flora_export", "google", "grpc", "huggingface_hub", "jinja2", "ml_dtypes", "mobius", "numpy",
    "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript", "packaging", "peft", "re", "safetensors", "tokenizers", "torch",
    "transformers", "tritonclient",
}  # fmt: skip
RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")
TALKS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
# What changes a directory, and which of the event's arguments is the open directory that a relative path begins at.
CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2, "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1}


class Hang(BaseException):
    """An input took longer than SECONDS. No reader may take it for an error of the file."""


class Guard:
    """Watches the process. One for its life: audit hooks cannot be taken away."""

    def __init__(self, work: Path, *readable: Path) -> None:
        """`work` is the only directory that may be written to; beside Python's own it and `readable` may be read."""
        self.events: list[str] = []
        self.imports: set[str] = set()  # packages beyond PACKAGES
        self.armed = False
        self._writable = (str(work.resolve()), "/dev/null")
        own = (sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent.parent), "/usr/lib/python3")
        known = (
            os.path.expanduser("~/.cache/huggingface"),
            *(f"/proc/{os.getpid()}/{name}" for name in ("cgroup", "maps", "mountinfo", "mounts", "stat", "status", "task")),
            "/proc/meminfo",
            "/proc/cpuinfo",
            "/sys/",
            "/dev/urandom",
            "/etc/localtime",
            "/usr/share/zoneinfo",
        )
        self._readable = (*self._writable, *(os.path.realpath(path) for path in own), *own, *known, *map(str, readable))
        sys.addaudithook(self._hook)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._held = 0  # bytes, at most; 0 before the first input
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, self._alarm)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the reading of one input. Raises Hang; afterwards `events` has what happened."""
        self.events, self.imports = [], set()
        before = self._held or self._largest()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS * PATIENCE)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            grown = (largest := self._largest()) - before
            self._held = largest
            if grown > GROWTH:
                self.events.append(f"memory grew by {grown >> 20} MiB")

    def _largest(self) -> int:
        """The most bytes that this program has held. getrusage would count what the program held that started this one."""
        found = re.search(rb"VmHWM:\s+(\d+) kB", os.pread(self._status, 1 << 14, 0))
        assert found is not None
        return int(found[1]) * 1024

    def _alarm(self, *_: object) -> None:
        raise Hang(f"over {SECONDS} s")

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            self._opened(*arguments)
        elif event == "import":
            self.imports |= {str(arguments[0]).partition(".")[0]} - PACKAGES - sys.stdlib_module_names
        elif event == "ctypes.dlopen":
            if not str(arguments[0]).startswith((*self._readable[2:], "None", "lib")):
                self._note(f"loaded {arguments[0]}")
        elif event in RUNS or event in TALKS:
            self._note(f"{event} {arguments!r:.200}")
        elif event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if not file.startswith((*self._readable[2:], "<frozen", "<string>", "<__array_function__", "<attrs", "<template>")):
                self._note(f"ran code of {file!r}")
        elif event in CHANGES and not _path(arguments[0], arguments[CHANGES[event]]).startswith(self._writable):
            self._note(f"{event} {arguments!r:.200}")

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        if isinstance(path, int):
            return
        writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        where = os.path.realpath(_path(path))
        if not writes and os.path.islink(path) and _path(path).startswith(self._writable):
            return  # what a link leads to may be read, as the hub's cache has it
        if not where.startswith(self._writable if writes else self._readable):
            self._note(f"{'wrote' if writes else 'read'} {where}")

    def _note(self, what: str) -> None:
        if len(self.events) < 5:
            self.events.append(what)


def _path(path: Any, directory: Any = None) -> str:
    """In full; a relative one begins at `directory`, where that is an open directory's number."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return str(path)
    start = os.readlink(f"/proc/self/fd/{directory}") if isinstance(directory, int) and directory >= 0 else ""
    return os.path.abspath(os.path.join(start, os.fsdecode(path)))


def limit_memory(room: int = ROOM) -> None:
    """No more addresses than the process has now and `room` beside: a bomb becomes a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def report_opens_of_safetensors() -> None:
    """Safetensors opens files in Rust, which Python's audit does not see: have it say so. Before flora_export is imported."""
    import safetensors

    opened = safetensors.safe_open

    def safe_open(path: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit("open", path, "r", 0)
        return opened(path, *arguments, **options)

    safetensors.safe_open = safe_open


def stay_inside(work: Path) -> None:
    """Temporary files go into `work`."""
    tempfile.tempdir = str(work)
