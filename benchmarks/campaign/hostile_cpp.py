"""The C++ reader (examples/cpp/fuzz.cpp) on hostile files, under AddressSanitizer and UndefinedBehaviorSanitizer.

`full` fuzzes with libFuzzer where Clang and its runtime are there. Else, and for `short`, each file of the corpus is read once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.campaign import fuzz_seeds as seeds
from benchmarks.campaign.outcome import Outcome, Size
from flora_export.artifact import DATA, GOLDEN, MANIFEST, MODEL, seal
from flora_export.bank import Bank
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.manifest import BlockRecord
from flora_export.verify.golden import Recorded, write_golden
from tests.cpp import ROOT, RUNTIME, build_example, what_is_missing

PROMISE = "the C++ reader under ASan and UBSan: a refusal, and nothing else, on hostile files"
CORPUS = ROOT / "tests" / "corpus"
BUILD = ROOT / "build" / "cpp-fuzz"
SANITIZERS = "-O1 -g -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all"
SECONDS, JOBS = 45, 2
# The first byte of an input, and the corpora of Python's readers of the same file.
READERS = {
    "S": ("adapter_weights", "base_weights"), "G": ("golden", "golden_bank"), "O": ("onnx",), "M": ("manifest", "manifest_bank"),
    "C": ("base_config",), "W": ("adapter_weights",), "A": ("adapter_config",),
}  # fmt: skip
_BLOCK = "model.layers.0.mlp"


def sound_files(directory: Path) -> Path:
    """`bank`, a stack of two slots, and `adapter`, which fits it."""
    names = {m: f"{_BLOCK}.ffba_{m}.weight_t" for m in "GAB"}
    room, width = seeds.RANK, seeds.WIDTH
    tensors = {names[m]: np.zeros((3, room, width) if m == "B" else (3, width, room), np.float32) for m in "GAB"}
    bank = directory / "bank"
    bank.mkdir(parents=True)
    values = [ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in tensors.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=10), bank / MODEL, external_data=DATA, size_threshold_bytes=0)
    (bank / "config.json").write_text(json.dumps(seeds.BASE))
    write_golden([Recorded(np.arange(3), np.arange(2), seeds.numbers(2, seeds.VOCABULARY), 0)], bank)
    blocks = [BlockRecord(_BLOCK, "gated", room, 2.0, "none", "bank", ["a"], ["b"])]
    seal(bank, seeds.manifest(bank=Bank("stack", ("one", ""), ("0" * 64, "")), blocks=blocks))
    tensors = {key: value for key, value in seeds.ffba_tensors().items() if ".mlp." in key}
    seeds.write_adapter(directory / "adapter", seeds.FFBA | {"target_modules": ["mlp"], "rank_pattern": {}}, tensors)
    return directory


def inputs(directory: Path, sound: Path) -> list[Path]:
    """The corpus as files whose first byte chooses the reader: the sound files, Python's corpora, and what libFuzzer has found."""
    directory.mkdir()
    own = {"M": MANIFEST, "C": "config.json", "G": GOLDEN, "O": MODEL, "S": GOLDEN}
    files = {f"{reader}-sound": (reader, sound / "bank" / name) for reader, name in own.items()}
    files |= {"A-sound": ("A", sound / "adapter" / CONFIG), "W-sound": ("W", sound / "adapter" / WEIGHTS)}
    for reader, targets in READERS.items():
        files |= {f"{reader}-{file.name}": (reader, file) for target in targets for file in (CORPUS / target).glob("*")}
    for name, (reader, file) in files.items():
        (directory / name).write_bytes(reader.encode() + file.read_bytes())
    for file in (CORPUS / "cpp").glob("*"):
        shutil.copyfile(file, directory / file.name)
    return sorted(directory.iterdir())


def build_fuzzer() -> Path | str:
    """flora-fuzz with libFuzzer, or why it cannot be built."""
    compiler = next(filter(None, map(shutil.which, ("clang++", "clang++-14", "clang++-16", "clang++-18"))), None)
    if compiler is None:
        return "no clang++"
    source = ["-S", str(ROOT / "examples" / "cpp"), "-B", str(BUILD), f"-DCMAKE_CXX_COMPILER={compiler}", f"-DONNXRUNTIME_ROOT={RUNTIME}"]
    for command in (
        ["cmake", *source, "-DFLORA_FUZZ=ON", f"-DCMAKE_CXX_FLAGS={SANITIZERS}"],
        ["cmake", "--build", str(BUILD), "--target", "flora-fuzz", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode != 0:
            return f"{compiler} does not build it: {(done.stderr.strip().splitlines() or ['?'])[-1]:.200}"
    return BUILD / "flora-fuzz"


def run(work: Path, size: Size, seed: int, lost: Path) -> Outcome:
    """libFuzzer for some seconds, or the corpus once."""
    outcome = Outcome("hostile", PROMISE)
    missing, started = what_is_missing(), time.monotonic()
    if missing is not None:
        outcome.not_tried.append(f"the C++ reader: {missing}")
        return outcome
    fuzzer: Path | str = build_fuzzer() if size == "full" else "short"
    with tempfile.TemporaryDirectory(prefix="cpp-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else work) as scratch:
        if isinstance(fuzzer, Path):
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(lambda job: _fuzz(fuzzer, Path(scratch) / str(job), seed + job, lost, outcome), range(1, JOBS + 1)))
        else:
            if size == "full":
                outcome.not_tried.append(f"libFuzzer on the C++ reader: {fuzzer}; its corpus was read instead")
            _replay(build_example().with_name("flora-fuzz"), Path(scratch) / "replay", lost, outcome)
    outcome.figures["seconds"] = round(time.monotonic() - started, 1)
    return outcome


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {"FLORA_FUZZ_DIR": str(home), "ASAN_OPTIONS": "allocator_may_return_null=0:max_allocation_size_mb=2048"}


def _replay(program: Path, scratch: Path, lost: Path, outcome: Outcome) -> None:
    home = sound_files(scratch / "home")
    files = inputs(scratch / "inputs", home)
    done = _run([str(program), *map(str, files)], home, 300)
    seen = [line for line in done.stderr.splitlines() if line in set(map(str, files))]
    outcome.tried = len(seen)
    outcome.figures = {"corpus": len(files)}
    if done.returncode != 0:
        outcome.losses.append(_loss(done, Path(seen[-1]) if seen else None, lost))


def _fuzz(program: Path, scratch: Path, seed: int, lost: Path, outcome: Outcome) -> None:
    """One job of libFuzzer. It ends at the first loss."""
    home = sound_files(scratch / "home")
    inputs(scratch / "inputs", home)
    limits = [
        f"-max_total_time={SECONDS}",
        "-timeout=25",
        "-rss_limit_mb=2048",
        "-max_len=16384",
        f"-seed={seed + 1}",
        "-print_final_stats=1",
    ]
    done = _run([str(program), *limits, f"-artifact_prefix={scratch}/", str(scratch / "inputs")], home, SECONDS + 120)
    executed = re.findall(r"number_of_executed_units: (\d+)", done.stderr) or re.findall(r"^#(\d+)", done.stderr, re.MULTILINE) or ["0"]
    edges = re.findall(r"cov: (\d+)", done.stderr) or ["0"]
    outcome.tried += int(executed[-1])
    figures = {"executions": int(executed[-1]), "edges": int(edges[-1]), "corpus": len(list((scratch / "inputs").iterdir()))}
    outcome.figures[f"job {seed}"] = figures | {"per_second": int(executed[-1]) // SECONDS}
    if done.returncode != 0:
        died = next((path for path in scratch.iterdir() if re.match(r"(crash|timeout|oom|leak)-", path.name)), None)
        outcome.losses.append(_loss(done, died, lost))


def _run(command: Sequence[str], home: Path, limit: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=_environment(home), capture_output=True, text=True, errors="replace", check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        stderr: Any = error.stderr or b""
        return subprocess.CompletedProcess(command, -1, "", stderr.decode(errors="replace") + f"\nERROR: it ran for {limit} s")


def _loss(done: subprocess.CompletedProcess[str], died: Path | None, lost: Path) -> str:
    words = re.findall(r"^.*(?:ERROR: |runtime error: |terminate called|what\(\): ).*$", done.stderr, re.MULTILINE) or ["?"]
    if died is None:
        return f"it ended with {done.returncode}: {words[0]:.200}"
    lost.mkdir(parents=True, exist_ok=True)
    kept = shutil.copyfile(died, lost / f"cpp-{died.name}")
    return f"it ended with {done.returncode}: {' '.join(words)[:300]} ({kept})"


def keep_corpus(seconds: int, longest: int = 1024) -> None:
    """Make tests/corpus/cpp anew: what libFuzzer finds in some seconds beyond Python's corpora, the fewest small files for its coverage."""
    program, kept = build_fuzzer(), CORPUS / "cpp"
    assert isinstance(program, Path), program
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        homes = [sound_files(Path(scratch) / name) for name in ("home", "again")]
        inputs(Path(scratch) / "known", homes[0])
        (Path(scratch) / "found").mkdir()
        limits = [f"-max_total_time={seconds}", f"-max_len={longest}"]
        _run([str(program), *limits, f"{scratch}/found", f"{scratch}/known"], homes[0], seconds + 60)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(Path(scratch) / "known", kept)
        known = {file.name for file in kept.iterdir()}
        _run([str(program), "-merge=1", str(kept), f"{scratch}/found"], homes[1], 300)
        for name in known:
            (kept / name).unlink()


if __name__ == "__main__":
    keep_corpus(int(sys.argv[1]))
