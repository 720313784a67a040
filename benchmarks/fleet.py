"""A fleet against one build after the other; and a fleet whose workers, or which itself, is killed in the middle.

    python benchmarks/fleet.py --base models/smollm2 --size full

`small` tries it in minutes and writes nothing. Byte for byte, a fleet's artifacts are those of builds one after the other; that is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import random_adapter, summary, write_result

ROOT = Path(__file__).parent.parent
TRAINED = [ROOT / "examples" / "01_train_ffba" / "adapter", ROOT / "examples" / "07_bank" / "facts"]
COMMAND = [sys.executable, "-m", "flora_export.cli"]
# What one process does that builds them all: the arm between a fleet and a command for each.
IN_TURN = """
import json, sys, time
from pathlib import Path
from flora_export import pipeline

base, out, *adapters = sys.argv[1:]
for adapter in adapters:
    moments, output = [], Path(out) / Path(adapter).name
    note = lambda what, *_: moments.append((what, time.perf_counter()))
    pipeline.build(Path(adapter), base, output, pipeline.BuildOptions(), note)
    moments.append(("", time.perf_counter()))
    phases = {}
    for (what, began), (_, ended) in zip(moments, moments[1:]):
        phases[what] = phases.get(what, 0.0) + ended - began
    print(json.dumps(phases), flush=True)
"""


@dataclass(frozen=True)
class Size:
    tiny: int  # adapters
    tiny_alone: int  # of them, built by a command each
    smollm2: int
    smollm2_alone: int  # built by a command each, and by one process in turn
    kills: int  # of workers
    stops: int  # of whole fleets


SIZES = {"small": Size(4, 2, 0, 0, 2, 1), "full": Size(100, 10, 8, 3, 60, 20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size, draw = SIZES[options.size], random.Random(options.seed)
    os.environ |= {
        "OMP_WAIT_POLICY": "passive",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    sys.path.insert(0, str(ROOT))
    work = Path(tempfile.mkdtemp(prefix="fleet-"))
    try:
        from tests.families import make_adapter, make_speaking_base

        base = make_speaking_base(work / "base")
        tiny = [make_adapter(base, work / "tiny" / f"a{number:03}", seed=number) for number in range(size.tiny)]
        found: dict[str, Any] = {"tiny": compared(base, tiny, size.tiny_alone, size.tiny, work / "one")}
        if size.smollm2:
            large = [Path(shutil.copytree(path, work / "large" / f"trained{number}")) for number, path in enumerate(TRAINED)]
            numbers = range(size.smollm2 - len(large))
            large += [random_adapter(options.base, work / "large" / f"random{number}", 8, seed=number) for number in numbers]
            found["smollm2"] = compared(options.base.resolve(), large, size.smollm2_alone, size.smollm2_alone, work / "two")
        trial = Trial(base, tiny[:8], work / "one" / "in-turn", work / "killed", draw)
        found |= {
            "workers_killed": trial.workers(size.kills),
            "fleets_killed": trial.fleets(size.stops),
            "interrupted": trial.interrupted(),
        }
        what = (
            "adapters built and verified for ONNX Runtime, fp32; seconds of whole processes, imports included; `alone` and `in_turn` are "
            "what was measured of `measured` adapters, for all of them; `phases`: seconds of the first build in turn, medians of the others"
        )
        content = {"what": what, "size": options.size, "seed": options.seed, **found}
        if options.size == "full":
            write_result("fleet", content)
        else:
            print(json.dumps(content, indent=1))
        lost = [loss for part in ("workers_killed", "fleets_killed", "interrupted") for loss in found[part]["losses"]]
        sys.exit("\n".join(lost) or 0)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def compared(base: Path, adapters: list[Path], alone: int, in_turn: int, place: Path) -> dict[str, Any]:
    """A fleet, a command for each, and one process for all of them, on the same adapters."""
    arms, seconds = {}, []
    for adapter in adapters[:alone]:
        began = time.perf_counter()
        run(["build", adapter, "--base", base, "--backend", "onnxruntime", "--output", place / "alone" / adapter.name])
        seconds.append(time.perf_counter() - began)
    arms["alone"] = {"measured": alone, "each": summary(seconds), "seconds": sum(seconds) / alone * len(adapters)}
    command = [sys.executable, "-c", IN_TURN, str(base), str(place / "in-turn"), *map(str, adapters[:in_turn])]
    began = time.perf_counter()
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    whole = time.perf_counter() - began
    phases = [json.loads(line) for line in ended.stdout.splitlines()]
    each = [sum(one.values()) for one in phases]
    rest = sum(each[1:]) / max(1, len(each) - 1)  # the first pays for what is imported on the way
    later = {what: statistics.median(one[what] for one in phases[1:]) for what in phases[0]}
    arms["in_turn"] = {"measured": in_turn, "each": summary(each), "seconds": whole + rest * (len(adapters) - in_turn)}
    arms["in_turn"]["phases"] = {"first": phases[0], "later": later}
    file = write_plan(place, base, adapters)
    began = time.perf_counter()
    done = json.loads(run(["fleet", file, "--json"]))
    whole = time.perf_counter() - began
    workers = min(len(adapters), len(os.sched_getaffinity(0)))
    arms["fleet"] = {"workers": workers, "each": summary([job["seconds"] for job in done["jobs"]]), "seconds": whole}
    began = time.perf_counter()
    again = json.loads(run(["fleet", file, "--json"]))
    arms["fleet_again"] = {"kept": again["counts"].get("kept", 0), "seconds": time.perf_counter() - began}
    differ = [
        adapter.name
        for adapter in adapters[:in_turn]
        if files(place / "in-turn" / adapter.name) != files(place / "out" / adapter.name / "cpu")
    ]
    return {"adapters": len(adapters), "verified": done["verified"], "differ_from_builds_in_turn": differ, "arms": arms}


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
                    os.kill(self.draw.choice(found), signal.SIGKILL)
                    done += 1
            reader.join()
            if fleet.returncode != 0:
                losses.append(f"round {rounds}: exit code {fleet.returncode}: {output[0][-500:]}")
            else:
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


def run(arguments: list[object]) -> str:
    ended = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{arguments} failed with {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


def files(directory: Path) -> dict[str, bytes]:
    """All of an artifact but its report, which has times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "report.json"} if directory.is_dir() else {}


def workers_of(driver: int) -> list[int]:
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
    return [pid for pid in actors if parents.get(parents.get(pid, 0)) == driver]


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


if __name__ == "__main__":
    main()
