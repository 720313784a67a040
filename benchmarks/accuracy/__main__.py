"""FFBA beside LoRA and its kin, at one budget of trainable parameters: accuracy on three families of tasks, and latency as deployed.

    python -m benchmarks.accuracy --base models/smollm2                      # small: two CPU cores, under 45 minutes
    python -m benchmarks.accuracy --base models/smollm2 --preset full        # every method, on a GPU
    python -m benchmarks.accuracy --base models/smollm2 --preset ablation    # what FFBA's defaults bring, on validation alone

First each method's learning rate is chosen, task by task, by the loss on validation examples; all methods have the same rates to choose
from, the same steps, batches and training examples. Then each is trained with every seed at that rate, and judged by test examples, once.
What was trained is kept in --work: a comparison that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy.experiment import experiment
from benchmarks.accuracy.kept import claim
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.presets import PRESETS
from benchmarks.accuracy.report import markdown, plot, summarise, sweep_table
from flora_export.errors import FloraExportError
from flora_export.verify.latency import environment

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2 directory, from examples/00_get_smollm2.py")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--methods", help="these alone, with commas between them, and the preset's first")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where accuracy-PRESET.json and its plot go")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    methods = tuple(dict.fromkeys([*preset.methods[:1], *options.methods.split(",")])) if options.methods else preset.methods
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods: {', '.join(unknown)} unknown; there are {', '.join(METHODS)}")
    try:
        made_with = claim(options.work, options.base)
    except (ValueError, FloraExportError) as error:
        parser.error(str(error))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        **experiment(preset, methods, options.base, options.work),
        "made_with": made_with,
        "environment": environment(),
    }
    result["process_seconds"] = round(sum(record["seconds"] for record in [*result["sweep"], *result.get("runs", [])]))  # kept runs too
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = methods if options.methods else ()  # a part of the table leaves the whole one alone
    place = options.output / f"{'-'.join(('accuracy', options.preset, *chosen))}.json"
    if preset.test:
        result["summary"] = summarise(result)
        result["table"] = markdown(result["summary"]).splitlines()
        plot(result["summary"], place.with_suffix(".svg"))
    else:
        result["table"] = sweep_table(result).splitlines()
    place.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(result["table"]))


if __name__ == "__main__":
    main()
