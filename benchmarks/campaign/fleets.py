"""Fleets whose workers, or which themselves, are killed: what they leave is absent or whole, and the next run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "flora_export.cli"]


class Trial:
    """Fleets of the same adapters, killed; what they leave is held to what was built undisturbed."""

    def __init__(self, base: Path, adapters: list[Path], right: Path, place: Path, draw: random.Random) -> None:
        self.adapters, self.place, self.draw = adapters, place, draw
        self.right = {adapter.name: files(right / adapter.name) for adapter in adapters}
        self.plan = write_plan(place, base, adapters)
        self.out = place / "out"

    def workers(self, kills: int) -> dict[str, Any]:
        """SIGKILL for one worker after the other, at random moments of its work."""
        done, rounds, losses, attempts = 0, 0, list[str](), 0
        while done < kills:
            shutil.rmtree(self.out, ignore_errors=True)
            fleet = self.start("--retries", "1000", "--json")
            output: list[str] = []
            reader = threading.Thread(target=lambda process=fleet, lines=output: lines.append(process.communicate()[0]))
            reader.start()
            rounds += 1
            while fleet.poll() is None and done < kills:
                time.sleep(self.draw.uniform(0.2, 6.0))
                if found := workers_of(fleet.pid):
                    with contextlib.suppress(ProcessLookupError):  # it has ended since
                        os.kill(self.draw.choice(found), signal.SIGKILL)
                        done += 1
            reader.join()
            if fleet.returncode != 0:
                losses.append(f"round {rounds}: exit code {fleet.returncode}: {output[0][-500:]}")
                break  # the next would end as this one
            attempts += sum(job["attempts"] for job in json.loads(output[0])["jobs"])
            losses += [f"round {rounds}: {loss}" for loss in self.losses(all_there=True)]
        jobs = rounds * len(self.adapters)
        return {"kills": done, "fleets": rounds, "jobs": jobs, "attempts": attempts, "losses": losses}

    def fleets(self, stops: int) -> dict[str, Any]:
        """SIGKILL for the whole fleet, at random moments; what it leaves is absent or whole, and the next goes on."""
        shutil.rmtree(self.out, ignore_errors=True)
        losses, kept = [], 0
        for number in range(stops):
            fleet = self.start()
            time.sleep(self.draw.uniform(0.5, 25.0))
            there = workers_of(fleet.pid)
            fleet.kill()
            fleet.communicate()
            losses += [f"stop {number}: a worker lives on" for pid in there if not gone(pid)]
            losses += [f"stop {number}: {loss}" for loss in self.losses(all_there=False)]
            if len([name for name in self.right if (self.out / name / "cpu").exists()]) == len(self.right):
                shutil.rmtree(self.out)
        fleet = self.start("--json")
        stdout, stderr = fleet.communicate()
        if fleet.returncode:
            losses.append(f"the run after all stops: exit code {fleet.returncode}: {stderr[-500:]}")
        else:
            kept = json.loads(stdout)["counts"].get("kept", 0)
        return {"stops": stops, "kept_by_the_last": kept, "losses": losses + self.losses(all_there=True)}

    def interrupted(self) -> dict[str, Any]:
        """Ctrl-C while workers build: 130, one line, and nobody lives on."""
        shutil.rmtree(self.out, ignore_errors=True)
        fleet = self.start()
        waited(lambda: bool(list(self.out.glob("*/.cpu.building-*"))), 120)
        there = workers_of(fleet.pid)
        began = time.perf_counter()
        fleet.send_signal(signal.SIGINT)
        stderr = fleet.communicate()[1]
        losses = [] if fleet.returncode == 130 else [f"Ctrl-C: exit code {fleet.returncode}: {stderr[-500:]}"]
        losses += [] if stderr.splitlines()[-1:] and stderr.count("error: ") == 1 else [f"Ctrl-C: it said {stderr[-500:]}"]
        losses += ["Ctrl-C: a worker lives on" for pid in there if not gone(pid)] + ([] if there else ["Ctrl-C: no worker was seen"])
        losses += [f"Ctrl-C: {path.name} is left" for path in self.out.glob("*/.cpu.building-*")]
        return {"seconds": time.perf_counter() - began, "losses": losses + self.losses(all_there=False)}

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*COMMAND, "fleet", str(self.plan), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def losses(self, *, all_there: bool) -> list[str]:
        found = []
        for name, right in self.right.items():
            out = self.out / name / "cpu"
            if out.exists() and files(out) != right:
                found.append(f"{out.name} of {name} is not what was built undisturbed")
            elif all_there and not out.exists():
                found.append(f"{name} was not built")
        if all_there:
            found += [f"{path.name} is left" for path in self.out.glob("*/.*building*")]
        return found


def write_plan(place: Path, base: Path, adapters: list[Path]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    named = {adapter.name: str(adapter) for adapter in adapters}
    content = {"version": 1, "base": str(base), "output": "out", "adapters": named, "targets": {"cpu": {"backend": "onnxruntime"}}}
    (place / "plan.yaml").write_text(json.dumps(content))  # JSON is YAML
    return place / "plan.yaml"


def files(directory: Path) -> dict[str, bytes]:
    """All of an artifact but its report, which has times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "report.json"} if directory.is_dir() else {}


def workers_of(fleet: int) -> list[int]:
    """The processes of actors below a fleet's, by their names and their parents."""
    parents, actors = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cmdline").read_bytes().startswith(b"ray::Worker"):
                    actors.append(int(entry.name))
            except OSError:
                continue  # it has ended meanwhile
    ancestor = {pid: parents.get(parents.get(parents.get(pid, 0), 0), 0) for pid in actors}  # a raylet's, a driver's, a fleet's
    return [pid for pid in actors if ancestor[pid] == fleet]


def gone(pid: int) -> bool:
    def state() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return waited(state, 20)


def waited(until: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
