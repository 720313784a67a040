"""A fleet against one build after the other.

    python -m benchmarks.fleet --base models/smollm2 --size full

`small` tries it in minutes and writes nothing. Byte for byte, a fleet's artifacts are those of builds one after the other; that is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign.fleets import COMMAND, files, write_plan
from benchmarks.common import random_adapter, summary, write_result

ROOT = Path(__file__).parent.parent
TRAINED = [ROOT / "examples" / "01_train_ffba" / "adapter", ROOT / "examples" / "07_bank" / "facts"]
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


SIZES = {"small": Size(4, 2, 0, 0), "full": Size(100, 5, 8, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    size = SIZES[options.size]
    os.environ |= {
        "OMP_WAIT_POLICY": "passive",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
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
        what = (
            "adapters built and verified for ONNX Runtime, fp32; seconds of whole processes, imports included; `alone` and `in_turn` are "
            "what was measured of `measured` adapters, for all of them; `phases`: seconds of the first build in turn, medians of the others"
        )
        content = {"what": what, "size": options.size, **found}
        if options.size == "full":
            write_result("fleet", content)
        else:
            print(json.dumps(content, indent=1))
        sys.exit(any(arms["differ_from_builds_in_turn"] for arms in found.values()))
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


def run(arguments: list[object]) -> str:
    ended = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{arguments} failed with {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


if __name__ == "__main__":
    main()
