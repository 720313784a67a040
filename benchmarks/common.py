"""What every benchmark shares: an adapter to measure with, the machine and versions in the result, medians, and where results go."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_export.verify.latency import environment

if TYPE_CHECKING:
    from flora_export.ffba import FFBAConfig

RESULTS = Path(__file__).parent / "results"


def random_adapter(base: Path, directory: Path, rank: int, seed: int = 0) -> Path:
    """A random FFBA adapter of full strength on attention and MLP: latency does not depend on the numbers."""
    from flora_export.ffba import FFBAConfig

    return write_random(FFBAConfig(r=rank, alpha=float(rank), gated_gain=1.0, task_type="CAUSAL_LM"), base, directory, seed)


def write_random(config: FFBAConfig, base: Path, directory: Path, seed: int = 0) -> Path:
    """An FFBA adapter of random numbers for a base model, as PEFT writes it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = copy.copy(config)
    config.init_ffba_weights = False
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
