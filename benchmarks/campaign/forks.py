"""Commands of flora-export in forked children of one warmed-up process: a fresh interpreter would spend seconds on importing PyTorch.

    with Forks(work) as forks:
        (ended,) = forks.run([Run(["build", ...], {"kill_at_event": {"event": 7}})])

`python -m benchmarks.campaign.forks` is that process: a line of JSON asks for runs that start together, a line answers. It has imported
what the commands import, and has started no thread that a child would lack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM = ("torch", "transformers", "peft", "mobius", "onnx", "onnxruntime", "onnxruntime_genai", "safetensors.torch", "tritonclient.grpc")
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Run:
    """A command line of flora-export, what is done to the child before it (`child.SETUPS`), and a signal after some seconds."""

    args: Sequence[str]
    setups: dict[str, dict[str, Any]] = field(default_factory=dict)
    signal_after: float | None = None  # seconds
    signal: int = signal.SIGKILL
    start_after: float = 0.0
    timeout: float = 120.0


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; None where it did not end in time, and was killed for that."""

    code: int | None
    seconds: float
    events: int  # changes of files, as audit hooks tell
    out: str
    err: str

    @property
    def error(self) -> str:
        """The lines of stderr that are no progress."""
        return "\n".join(line for line in self.err.splitlines() if line and not line.endswith(" ..."))

    def told(self) -> str:
        """For a loss: the code, and the last line of stderr."""
        return f"exit {self.code}: {(self.error.splitlines() or ['nothing on stderr'])[-1][:300]}"


class Forks:
    """The warmed-up process, from this side."""

    def __init__(self, work: Path, **environment: str) -> None:
        self.work = work
        self.temp = work / "tmp"
        self.temp.mkdir(parents=True, exist_ok=True)
        self.cache = work / "cache"
        own = {
            "TMPDIR": str(self.temp),
            "FLORA_EXPORT_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.campaign.forks", str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
            env=os.environ | own | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def run(self, runs: Sequence[Run]) -> list[Ended]:
        """Run commands that start together, to their ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([dataclasses.asdict(run) for run in runs]).encode() + b"\n")
        self.process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self.process.stdout.readline())]

    def one(self, args: Sequence[object], **options: Any) -> Ended:
        """Run one command to its end."""
        return self.run([Run([str(arg) for arg in args], **options)])[0]


def serve(work: Path, answers: io.TextIOBase) -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        runs = [Run(**each) for each in json.loads(line)]
        answers.write(json.dumps([dataclasses.asdict(ended) for ended in _run_all(runs, work)]) + "\n")
        answers.flush()


def _run_all(runs: Sequence[Run], work: Path) -> list[Ended]:
    from benchmarks.campaign.child import become

    children: dict[int, tuple[int, int]] = {}  # pidfd -> (which run, pid)
    begun, ready = os.pipe()
    for index, run in enumerate(runs):
        log = work / f"log{index}"
        log.mkdir(exist_ok=True)
        pid = os.fork()
        if not pid:
            try:
                become(run, log, ready)  # never returns
            finally:
                os._exit(71)
        children[os.pidfd_open(pid)] = (index, pid)
    os.close(ready)
    while os.read(begun, 1):  # each child closes it as its command begins
        pass
    os.close(begun)
    started = time.monotonic()
    ended: dict[int, Ended] = {}
    signalled: set[int] = set()
    late: set[int] = set()
    while children:
        now = time.monotonic() - started
        due = []
        for index, pid in children.values():
            run = runs[index]
            if run.signal_after is not None and index not in signalled:
                due.append((run.signal_after + run.start_after, run.signal, index, pid))
            due.append((run.timeout + run.start_after, signal.SIGKILL, index, pid))
        moment, number, index, pid = min(due)
        if moment <= now:
            (late if moment >= runs[index].timeout else signalled).add(index)
            os.kill(pid, number)
            if index in late:
                moment = now + 10.0
        ready, _, _ = select.select(list(children), [], [], max(0.0, moment - now))
        for descriptor in ready:
            index, pid = children.pop(descriptor)
            os.close(descriptor)
            code: int | None = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            seconds = time.monotonic() - started - runs[index].start_after
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what a killed command has started itself
            ended[index] = _ended(None if index in late else code, seconds, work / f"log{index}")
    return [ended[index] for index in range(len(runs))]


def _ended(code: int | None, seconds: float, log: Path) -> Ended:
    texts = [
        (log / name).read_text(encoding="utf-8", errors="replace") if (log / name).is_file() else "" for name in ("out", "err", "events")
    ]
    return Ended(code, seconds, int(texts[2] or 0), texts[0], texts[1])


def warm() -> None:
    """Import what commands import, and run nothing."""
    import importlib
    import warnings

    warnings.simplefilter("ignore")
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in ("pipeline", "publish", "refill", "rebuild", "convert", "quantized_base", "bench", "generate", "verify.formats", "cli"):
        importlib.import_module(f"flora_export.{name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  # lazy until they are named

    from flora_export.backends import BACKENDS, load_backend

    for name in BACKENDS:
        with contextlib.suppress(Exception):
            load_backend(name)
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by what is imported is no answer
    warm()
    serve(Path(sys.argv[1]), answers)
