"""What every benchmark shares: an adapter to measure with, the machine and versions in the result, medians, and where results go."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from flora_export.verify.latency import environment

RESULTS = Path(__file__).parent / "results"


def random_adapter(base: Path, directory: Path, rank: int, seed: int = 0) -> Path:
    """A random FFBA adapter of full strength on attention and MLP: latency does not depend on the numbers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from flora_export.ffba import FFBAConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = FFBAConfig(r=rank, alpha=float(rank), gated_gain=1.0, init_ffba_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(directory)
    return directory


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_result(name: str, content: dict[str, Any]) -> None:
    """Write benchmarks/results/{name}.json with the command that made it, and print it."""
    RESULTS.mkdir(exist_ok=True)
    module = sys.modules["__main__"].__spec__  # of `python -m`, which puts a path into argv
    program = sys.argv[0] if module is None else f"-m {module.name}"
    full = {"command": " ".join(["python", program, *sys.argv[1:]]), **content, "environment": environment()}
    text = json.dumps(full, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)
