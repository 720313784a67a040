"""Hostile directories through the real commands, each in a forked child of a process that has imported everything.

`python -m benchmarks.campaign.hostile_commands JOB` is that process. A child's time counts from the fork, in seconds of the processor, and
is held to what the command takes on sound files and 5 seconds more; its memory, to what it takes on sound files and 1.5 GiB more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.campaign.fuzz_guard import PATIENCE, Guard, limit_memory, report_opens_of_safetensors
from benchmarks.campaign.outcome import Outcome, Size

ROOT = Path(__file__).parent.parent.parent
PROMISE = "a hostile directory: exit 2 (1: not verified) with one line, in bounded time and memory, nothing outside, no code"
SECONDS, MEMORY = 5.0, 3 * 2**29
LONGEST_LINE = 4000
IMPORTED = "imported "  # begins an event that is none where sound files have it as well


@dataclass(frozen=True)
class Ran:
    code: int
    seconds: float  # of the processor, its own children's with it
    memory: int  # bytes beyond its parent's
    stdout: str
    stderr: str
    events: list[str]


def run(work: Path, size: Size, lost: Path) -> Outcome:
    """All cases, or for `short` one of each kind."""
    directory = Path(tempfile.mkdtemp(prefix="commands-", dir=work))
    report = directory / "report.json"
    job = directory / "job.json"
    job.write_text(json.dumps({"size": size, "work": str(directory), "report": str(report), "lost": str(lost)}))
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # what Python itself would write is not the files' doing
    command = [sys.executable, "-m", "benchmarks.campaign.hostile_commands", str(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=1800, check=False)
    if done.returncode != 0 or not report.is_file():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        return Outcome("hostile", PROMISE, 1, [f"the commands did not run: {done.returncode} {last}"])
    found = json.loads(report.read_text())
    return Outcome("hostile", PROMISE, found["tried"], found["losses"], found["figures"])


def in_child(arguments: Sequence[str], directory: Path, limit: float, readable: Sequence[Path] = ()) -> Ran:
    """`flora-export ARGUMENTS` in a fork of this process. Killed after `limit` seconds by the clock."""
    files = [directory / name for name in ("stdout", "stderr", "events")]
    before, started = _resident(), time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _command(arguments, directory, files, readable)
        finally:
            os._exit(code)
    with contextlib.suppress(ProcessLookupError):
        while True:
            finished, status, usage = os.wait4(child, os.WNOHANG)
            if finished:
                break
            if time.monotonic() - started > limit:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)
    texts = [file.read_text(errors="replace") if file.is_file() else "" for file in files]
    seconds, memory = usage.ru_utime + usage.ru_stime, max(0, usage.ru_maxrss * 1024 - before)
    return Ran(os.waitstatus_to_exitcode(status), seconds, memory, *texts[:2], texts[2].splitlines())


def _command(arguments: Sequence[str], directory: Path, files: list[Path], readable: Sequence[Path]) -> int:
    os.setpgid(0, 0)
    for number, file in ((1, files[0]), (2, files[1])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    tempfile.tempdir = str(directory)
    limit_memory(8 * 2**30)
    guard = Guard(directory, *readable)
    guard.armed = True
    from flora_export.cli import main

    try:
        main([*arguments])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 71
    guard.armed = False
    files[2].write_text("\n".join([*guard.events, *(f"{IMPORTED}{name}" for name in sorted(guard.imports))]))
    sys.stdout.flush()
    return code


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def faults(ran: Ran, codes: tuple[int, ...], seconds: float, memory: int, secret: str) -> list[str]:
    """What a command did that it must not, given what it takes on sound files."""
    found = [] if ran.code in codes else [f"exit code {ran.code}: {_last(ran.stderr)}"]
    found += [f"{ran.seconds:.1f} s, of which {seconds:.1f} are its ordinary work"] if ran.seconds > seconds + SECONDS else []
    found += [f"{ran.memory >> 20} MiB"] if ran.memory > memory + MEMORY else []
    lines = [line for line in re.split(r"\r?\n", ran.stderr) if line.strip() and not re.fullmatch(r"[\w' .,:`-]+ \.\.\.( \d+/\d+)?", line)]
    errors = [line for line in lines if line.startswith("error: ")]
    if ran.code == 2 and not (len(lines) == len(errors) == 1):
        found.append(f"{len(lines)} lines of error: {' | '.join(lines)[:300]}")
    found += [f"a line of {len(line)} characters" for line in errors if len(line) > LONGEST_LINE]
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", ran.stdout + ran.stderr):
        found.append("control characters reach the terminal")
    if secret in ran.stdout + ran.stderr or "root:x:0:0" in ran.stdout + ran.stderr:
        found.append("it shows what is in a file outside")
    return found + ran.events


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:200]


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    work = Path(job["work"])
    report_opens_of_safetensors()
    from benchmarks.campaign.hostile_cases import SHORT, cases
    from benchmarks.campaign.hostile_directory import SECRET, Sound, sound_files

    sound_process = os.fork()  # a process that has run no threads can be forked
    if sound_process == 0:
        sound_files(work)
        os._exit(0)
    sound = Sound(work / "base", work / "adapter", work / "out", work / "secret", work / "ran")
    _import_everything()
    assert os.waitpid(sound_process, 0)[1] == 0
    chosen = [case for case in cases() if job["size"] == "full" or case.name in SHORT]
    ordinary: dict[str, Ran] = {}
    readable = [sound.base, sound.adapter, sound.out, work / "cases" / "sound-build"]
    for command, arguments in _ordinary(sound, work).items():
        if job["size"] == "short" and command in ("build", "explain", "triton"):
            continue  # no case of it
        (work / "cases" / f"sound-{command}").mkdir()
        ordinary[command] = in_child(arguments, work / "cases" / f"sound-{command}", 120, readable)
    losses = [f"sound files: {name} exits with {ran.code}: {_last(ran.stderr)}" for name, ran in ordinary.items() if ran.code not in (0, 1)]
    usual_events = {event for ran in ordinary.values() for event in ran.events}
    losses += [f"sound files: {event}" for event in sorted(usual_events) if not event.startswith(IMPORTED)]
    tried, slowest, largest = 0, 0.0, 0
    for case in chosen:
        tried += 1
        directory = work / "cases" / str(tried)
        directory.mkdir()
        try:
            arguments = case.make(directory, sound)
        except Exception as error:
            losses.append(f"{case.name}: it could not be made: {error!r:.200}")
            continue
        usual = ordinary[arguments[0]]
        before = _listed(work)
        ran = in_child(arguments, directory, PATIENCE * (usual.seconds + SECONDS), readable)
        ran = replace(ran, events=[event for event in ran.events if event not in usual_events])
        wrong = faults(ran, case.codes, usual.seconds, usual.memory, SECRET)
        wrong += [f"{name} appeared outside" for name in sorted(_listed(work) - before) if not name.startswith(f"cases/{tried}/")]
        wrong += ["it ran code"] if sound.ran.exists() else []
        sound.ran.unlink(missing_ok=True)
        losses += [f"{case.name}: {'; '.join(wrong)}"] if wrong else []
        slowest, largest = max(slowest, ran.seconds - usual.seconds), max(largest, ran.memory - usual.memory)
        subprocess.run(["rm", "-rf", str(directory)], check=False)
    figures = {
        "slowest_beyond_ordinary_s": round(slowest, 2), "largest_beyond_ordinary_mib": largest >> 20,
        "ordinary": {name: {k: v for k, v in asdict(ran).items() if k in ("code", "seconds", "memory")} for name, ran in ordinary.items()},
    }  # fmt: skip
    Path(job["report"]).write_text(json.dumps({"tried": tried, "losses": losses, "figures": figures}))


def _import_everything() -> None:
    import onnxruntime
    import peft
    import torch
    import transformers

    import flora_export.cli
    from flora_export import convert, generate, inspection, pipeline, publish, reference
    from flora_export.backends import onnxruntime as backend

    torch.set_num_threads(1)
    assert all((onnxruntime, peft, transformers, flora_export.cli, convert, generate, inspection, pipeline, publish, reference, backend))


def _ordinary(sound: Any, work: Path) -> dict[str, list[str]]:
    adapter, base, out = str(sound.adapter), str(sound.base), str(sound.out)
    return {
        "inspect": ["inspect", adapter, "--base", base],
        "build": ["build", adapter, "--backend", "onnxruntime", "--base", base, "--output", str(work / "cases/sound-build/o")],
        "explain": ["explain", out], "verify": ["verify", out], "generate": ["generate", out, "Hello", "--max-new-tokens", "3"],
        "triton": ["triton", out, str(work / "cases/sound-triton/repo")], "convert": ["inspect", adapter, "--base", base],
    }  # fmt: skip


def _listed(work: Path) -> set[str]:
    return {str(path.relative_to(work)) for pattern in ("*", "cases/*", "base/*", "adapter/*", "out/*") for path in work.glob(pattern)}


if __name__ == "__main__":
    main()
