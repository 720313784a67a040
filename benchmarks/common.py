"""What every benchmark shares: an adapter to measure with, the machine and versions in the result, medians, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flora-export", "onnxruntime", "mobius-onnx", "onnx-ir", "torch", "transformers", "peft", "numpy")


def random_adapter(base: Path, directory: Path, rank: int) -> Path:
    """A random FFBA adapter of full strength on attention and MLP: latency does not depend on the numbers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from flora_export.ffba import FFBAConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = FFBAConfig(r=rank, alpha=float(rank), init_ffba_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(directory)
    return directory


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        "unknown",
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), "versions": versions}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_result(name: str, content: dict[str, Any]) -> None:
    """Write benchmarks/results/{name}.json with the command that made it, and print it."""
    RESULTS.mkdir(exist_ok=True)
    full = {"command": "python " + " ".join(sys.argv), **content, "environment": environment()}
    text = json.dumps(full, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)
