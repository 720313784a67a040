"""Real base models of other families: an adapter with random numbers, fused, and verified against PyTorch.

    python benchmarks/other_bases.py gemma3-270m=models/gemma3-270m qwen2.5-coder-0.5b=models/qwen2.5-coder-0.5b

examples/05_other_bases/get_base.py makes such directories. Writes benchmarks/results/other_bases.json: for each base the verdict, and by
how many noise floors (what eager PyTorch in fp32 is off by, against fp64) the artifact was off at most.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from flora_export.errors import VerificationError
from flora_export.ffba import FFBAConfig
from flora_export.pipeline import BuildOptions, build

RESULT = Path(__file__).parent / "results" / "other_bases.json"
RANK, SPREAD = 16, 0.01  # of B's numbers


def make_adapter(base: Path, directory: Path) -> Path:
    """A default FFBA adapter, its B drawn at random: untrained, but with an effect."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), FFBAConfig(r=RANK, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "ffba_B" in name:
            torch.nn.init.normal_(parameter, std=SPREAD)
    model.save_pretrained(directory)
    return directory


def try_base(base: Path, directory: Path) -> dict[str, Any]:
    """Build and verify in fp32."""
    adapter = make_adapter(base, directory / "adapter")
    started = time.perf_counter()
    try:
        _, report = build(adapter, str(base), directory / "out", BuildOptions(), lambda *_: None)
        result = report.to_dict()
    except VerificationError as error:
        result = error.report
    seconds = time.perf_counter() - started
    cases = result["numerics"]["cases"]
    config = json.loads((base / "config.json").read_text())
    return {
        "family": config["model_type"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "verified": result["verified"],
        "causes": result["causes"],
        "seconds": round(seconds, 1),
        "largest_logit": max(case["largest_logit"] for case in cases),
        "largest_effect": max(case["largest_effect"] for case in cases),
        "most_floors_logits": max(case["logits_error"] / case["floor_logits"] for case in cases),
        "most_floors_effect": max(case["effect_error"] / case["floor_effect"] for case in cases),
        "cases": [
            {key: case[key] for key in ("name", "past", "base_error", "logits_error", "floor_logits", "effect_error", "floor_effect")}
            for case in cases
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = {}
    for named in arguments.bases:
        name, _, path = named.partition("=")
        with tempfile.TemporaryDirectory() as directory:
            results[name] = try_base(Path(path), Path(directory))
        print(name, {key: value for key, value in results[name].items() if key != "cases"}, file=sys.stderr)
    versions = {module: __import__(module).__version__ for module in ("torch", "transformers", "peft", "onnxruntime", "numpy")}
    record = {
        "command": "python benchmarks/other_bases.py " + " ".join(arguments.bases),
        "adapter": {"rank": RANK, "spread_of_B": SPREAD},
        "environment": {"machine": platform.machine(), "python": platform.python_version(), "versions": versions},
        "bases": results,
    }
    arguments.result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
