"""What verification takes, beside what it took at an earlier commit: seconds and peak memory, processes interleaved.

    python benchmarks/verify_cost.py --base models/smollm2 --before 651d819

Writes benchmarks/results/verify_cost.json. The earlier commit is checked out into a temporary directory and verifies the same artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "verify_cost.json"
ADAPTER = ROOT / "examples" / "01_train_ffba" / "adapter"

# Run in either tree: numerics alone, since that is what has changed.
CODE = """
import json, resource, sys, time
from pathlib import Path
from flora_export import pipeline
numbers = getattr(pipeline, "_verify_numerics", None) or pipeline.verify_numerics  # as it was called before
from flora_export.artifact import open_artifact
out, adapter, base = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
base, checkpoint = pipeline.load_sources(adapter, base)
artifact, silent = open_artifact(out), lambda *_: None
import flora_export.reference
started = time.perf_counter()
report = numbers(artifact, base, checkpoint, pipeline.VerifyOptions(), silent)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def measure(tree: Path, out: Path, base: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", CODE, str(out), str(ADAPTER), str(base.resolve())]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--before", required=True, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from flora_export.pipeline import BuildOptions, build

    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        before = Path(directory) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(before), arguments.before], cwd=ROOT, check=True)
        try:
            for precision in ("fp32", "fp16"):
                out = Path(directory) / precision
                build(ADAPTER, str(arguments.base), out, BuildOptions(precision=precision, verify=False), lambda *_: None)
                samples: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
                for turn in range(arguments.rounds):
                    for name, tree in (("before", before), ("now", ROOT)) if turn % 2 == 0 else (("now", ROOT), ("before", before)):
                        samples[name].append(measure(tree, out, arguments.base))
                        print(precision, name, samples[name][-1], file=sys.stderr, flush=True)
                medians = {
                    name: {key: round(statistics.median(s[key] for s in taken), 1) for key in ("seconds", "peak_mib")}
                    for name, taken in samples.items()
                }
                ratios = [new["seconds"] / old["seconds"] for old, new in zip(samples["before"], samples["now"], strict=True)]
                rows[precision] = medians | {
                    "ratio_seconds": round(statistics.median(ratios), 3),
                    "ratio_memory": round(medians["now"]["peak_mib"] / medians["before"]["peak_mib"], 3),
                    "samples": samples,
                }
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    versions = {module: __import__(module).__version__ for module in ("numpy", "torch", "transformers", "onnxruntime")}
    record = {
        "command": f"python benchmarks/verify_cost.py --base {arguments.base} --before {arguments.before} --rounds {arguments.rounds}",
        "before": arguments.before,
        "environment": {"cores": os.cpu_count(), "machine": platform.machine(), "versions": versions},
        "precisions": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
