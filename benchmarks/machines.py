"""The same verdict on every machine: builds, verifications and mutations under each setting that makes a processor compute otherwise.

    make machines

Writes benchmarks/results/machines.json: for each setting whether every right artifact passed, how many of the wrong ones were caught, and
whether the artifacts are those of the first setting, byte for byte. Exits with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "machines.json"
MUTATIONS = "tests/test_mutations.py"
ONE_CORE = "ONE_CORE"  # a setting of ours: the process may use one core alone, which ONNX Runtime goes by
DISTURB = "FLORA_TEST_DISTURB"  # tests/conftest.py: eager PyTorch's rotary frequencies are an ulp off

SETTINGS: dict[str, dict[str, str]] = {
    "as the machine is": {},
    "NumPy without AVX-512": {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
    "NumPy without AVX2": {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"},
    "PyTorch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "PyTorch without AVX2": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL with AVX2, strictly reproducible": {"MKL_CBWR": "AVX2,STRICT"},
    "one thread": {"OMP_NUM_THREADS": "1", ONE_CORE: "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "frequencies of eager PyTorch off by an ulp": {DISTURB: "1"},
}
SETTINGS["all of these, the least of each"] = {
    **SETTINGS["NumPy without AVX2"],
    **SETTINGS["PyTorch without AVX2"],
    **SETTINGS["oneDNN with SSE4.1"],
    **SETTINGS["one thread"],
    DISTURB: "1",
}

# What is built under each setting: family of tests/families.py, options. SmolLM2 comes to it where it is there.
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, half precision": ("llama", {"precision": "fp16"}),
    "gemma3, two rotary tables": ("gemma3", {}),
    "llama, plain checkpoint": ("llama", {"backend": "hf"}),
}


@contextlib.contextmanager
def one_core(alone: bool) -> Iterator[None]:
    """Have processes that are started within use a single core, where the setting says so."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)} if alone else cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run(setting: Mapping[str, str], command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments under a setting."""
    environment = {key: value for key, value in os.environ.items() if key not in {name for s in SETTINGS.values() for name in s}}
    environment |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", **{k: v for k, v in setting.items() if k != ONE_CORE}}
    with one_core(ONE_CORE in setting):
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def mutations(setting: Mapping[str, str], only: str | None = None) -> dict[str, Any]:
    """(right artifacts that passed, wrong ones that were caught), of how many, and the names of the others."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "cases.xml"
        done = run(setting, ["-m", "pytest", MUTATIONS, f"--junit-xml={file}", *(["-k", only] if only else [])])
        if done.returncode not in (0, 1):  # 1: some failed
            sys.exit(f"{MUTATIONS} does not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = [
            (case.get("name", ""), case.find("failure") is None and case.find("error") is None) for case in ET.parse(file).iter("testcase")
        ]
    wrong = [good for name, good in cases if name.startswith("test_a_wrong")]
    right = [good for name, good in cases if name.startswith("test_a_right")]
    missed = [name for name, good in cases if not good]
    return {"wrong": len(wrong), "wrong_caught": sum(wrong), "right": len(right), "right_passed": sum(right), "failures": missed}


def artifacts(setting: Mapping[str, str], sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Verdict, and SHA-256 of all files but the report, of what `sources` names."""
    with tempfile.TemporaryDirectory() as directory:
        plan, result = Path(directory) / "plan.json", Path(directory) / "result.json"
        plan.write_text(json.dumps(dict(sources)))
        done = run(setting, [str(Path(__file__)), "--build", str(plan), str(result)])
        if not result.is_file():
            sys.exit(f"no build under {dict(setting)}:\n{done.stderr[-3000:]}")
        made: dict[str, dict[str, Any]] = json.loads(result.read_text())
    return made


def build_all(plan: Path, result: Path) -> None:
    """In a process of its own, under a setting: build and verify what the plan says."""
    from flora_export.artifact import REPORT
    from flora_export.base_model import file_sha256
    from flora_export.errors import VerificationError
    from flora_export.pipeline import BuildOptions, build

    if os.environ.get(DISTURB):
        from tests.conftest import disturb_frequencies

        disturb_frequencies()
    made = {}
    for name, (base, adapter, options) in json.loads(plan.read_text()).items():
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            try:
                _, report = build(Path(adapter), base, out, BuildOptions(**options), lambda *_: None)
            except VerificationError as error:
                made[name] = {"verified": False, "causes": error.report["causes"]}
                continue
            files = sorted(path for path in out.iterdir() if path.name != REPORT)
            digest = hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()
            cases = report.numerics.cases if report.numerics is not None else []
            floors = max(case.logits_error / case.floor_logits for case in cases if case.floor_logits)
            made[name] = {"verified": report.verified, "sha256": digest, "most_floors": round(floors, 2)}
    result.write_text(json.dumps(made))


def make_sources(directory: Path, smollm2: Path | None) -> dict[str, Any]:
    """Bases and adapters, made once: random numbers may themselves depend on the processor."""
    from tests.families import make_adapter, make_base

    sources = {}
    for name, (family, options) in RIGHT.items():
        base = directory / family
        if not base.exists():
            make_base(family, base)
        targets = {"target_modules": ["mlp"]} if options.get("backend") == "hf" else {}
        adapter = make_adapter(base, directory / f"adapter for {name}", **targets)
        sources[name] = (str(base), str(adapter), options)
    if smollm2 is not None:
        sources["SmolLM2-135M, the example's adapter"] = (str(smollm2), str(ROOT / "examples" / "01_train_ffba" / "adapter"), {})
    return sources


def measure(settings: Mapping[str, Mapping[str, str]], smollm2: Path | None, only: str | None = None) -> dict[str, dict[str, Any]]:
    """The matrix: for each setting its mutations and its artifacts."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        sources = make_sources(Path(directory), smollm2)
        for name, setting in settings.items():
            started = time.perf_counter()
            built = artifacts(setting, sources)
            first = next(iter(rows.values()))["artifacts"] if rows else built
            same = {key: built[key].get("sha256") == first[key].get("sha256") for key in built}
            rows[name] = {"environment": dict(setting), **mutations(setting, only), "artifacts": built, "same_bytes": all(same.values())}
            rows[name]["seconds"] = round(time.perf_counter() - started, 1)
            print(f"{name:<45} {verdict(rows[name])}", file=sys.stderr, flush=True)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    passed = sum(artifact["verified"] for artifact in row["artifacts"].values())
    return (
        f"right {row['right_passed'] + passed}/{row['right'] + len(row['artifacts'])}, wrong {row['wrong_caught']}/{row['wrong']}, "
        f"bytes {'equal' if row['same_bytes'] else 'DIFFER'}, {row['seconds']:.0f} s"
    )


def good(row: Mapping[str, Any]) -> bool:
    """Right ones pass, wrong ones are caught, and the bytes are the same."""
    return not row["failures"] and row["same_bytes"] and all(artifact["verified"] for artifact in row["artifacts"].values())


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="SmolLM2's directory; without it tiny models alone are built")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--build", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build_all(*arguments.build)
        return
    rows = measure(SETTINGS, arguments.base)
    versions = {module: __import__(module).__version__ for module in ("numpy", "torch", "transformers", "onnxruntime", "onnx_ir")}
    record = {
        "command": "python benchmarks/machines.py" + (f" --base {arguments.base}" if arguments.base else ""),
        "processor": processor(),
        "versions": versions | {"python": platform.python_version()},
        "settings": rows,
    }
    arguments.result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(map(good, rows.values())) else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
