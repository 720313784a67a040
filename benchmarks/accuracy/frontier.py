"""The frontier: accuracy against latency, for FFBA and LoRA at many ranks. Which adapter, at which rank, for which decode step?

    python -m benchmarks.accuracy.frontier --base models/smollm2                   # small: two CPU cores, under 60 minutes
    python -m benchmarks.accuracy.frontier --base models/smollm2 --preset full     # every rank, five seeds: a GPU, or many hours
    python -m benchmarks.accuracy.frontier --base models/smollm2 --preset confirm      # small's best again: other seeds, more examples
    python -m benchmarks.accuracy.frontier --base models/smollm2 --preset longer       # and trained three times as long
    python -m benchmarks.accuracy.frontier --base models/smollm2 --preset placement    # branches elsewhere, on validation alone
    python -m benchmarks.accuracy.frontier --base models/smollm2 --tune            # choose rates and scales anew

Equal parameters are not equal latency: a fused adapter's cost starts near none and grows with its bytes, an unmerged LoRA's is there at
rank 1. So every method has its ranks, and every rank of each its own learning rate and its own factor on alpha, by the loss on validation
examples: rates first, beyond an end of their list while that is the best, then factors at the best rate, the same ones for all. What was
chosen is kept in frontier-PRESET-tuning.json beside the result and used from there. Then each arm is trained with every seed, and judged
by test examples. Runs are kept in --work; where that is gone, or on another machine, --resume takes them from what was written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy.frontier_latency import latency
from benchmarks.accuracy.frontier_report import markdown, plot, summarise, validation_table
from benchmarks.accuracy.kept import claim, differing, elsewhere
from benchmarks.accuracy.presets import PRESETS as AT_ONE_BUDGET
from benchmarks.accuracy.presets import Preset
from benchmarks.accuracy.runs import Run, keep, loss, run_all
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Fit
from flora_export.errors import FloraExportError
from flora_export.verify.latency import environment

RESULTS = Path(__file__).parent.parent / "results"
TUNING_SEED = 0
Arm = tuple[str, int]  # method, rank
Chosen = dict[str, dict[str, list[float]]]  # "method rank" -> task -> learning rate, factor on alpha


@dataclass(frozen=True)
class Frontier:
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    scales: tuple[float, ...]  # factors on a method's own alpha, tried at the best rate beside 1
    seeds: tuple[int, ...]
    steps: int
    batch: dict[str, int]
    validation: dict[str, int]
    test: dict[str, int]  # empty: validation decides, nothing is timed
    workers: int  # processes at a time
    threads: int  # of each
    rounds: int  # of the latency benchmark


def _examples_and_machine(preset: Preset) -> dict[str, Any]:
    """What a frontier has in common with the comparison at one budget: its examples, and how much runs at a time."""
    names = ("batch", "validation", "test", "workers", "threads", "rounds")
    return {name: getattr(preset, name) for name in names}


SMALL = Frontier(
    arms=(("ffba-mlp", 32), ("ffba", 8), ("ffba", 128), ("lora", 1), ("lora", 8)),
    rates=(1.5e-3, 3e-3, 6e-3),
    scales=(0.5, 2.0),
    seeds=(0, 1, 2),
    steps=40,
    **_examples_and_machine(AT_ONE_BUDGET["small"]) | {"rounds": 150},
)
# What small's validation chose, and a LoRA as large as that FFBA; seeds that chose nothing, and examples for a difference near 0.02.
CONFIRM = replace(
    SMALL,
    arms=(("ffba", 128), ("lora", 8), ("lora", 32)),
    seeds=(3, 4, 5, 6, 7),
    test={"arithmetic": 200, "lexical": 700, "dialogue": 100},
    rounds=60,
)
PRESETS = {
    "small": SMALL,
    "confirm": CONFIRM,
    # Whether the outcome depends on where training stops. What trains for longer may want another rate; alpha is each method's own.
    "longer": replace(CONFIRM, arms=(("ffba", 128), ("lora", 32)), rates=(7.5e-4, 1.5e-3), scales=(), steps=120, seeds=(3, 4, 5)),
    # Where a branch writes, at equal parameters: within 1 % of a LoRA of rank 8. The first is what the others have to beat.
    "placement": replace(SMALL, arms=(("ffba", 28), ("next", 16), ("carried", 13)), seeds=(0, 1, 2, 3, 4), test={}),
    "full": Frontier(
        arms=(
            *(("ffba-mlp", rank) for rank in (8, 32, 128)),
            *(("ffba", rank) for rank in (4, 8, 16, 32, 64, 128)),
            *(("lora", rank) for rank in (1, 2, 4, 8, 16, 32, 64)),
        ),
        rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        scales=(0.25, 0.5, 2.0, 4.0),
        seeds=(0, 1, 2, 3, 4),
        steps=300,
        **_examples_and_machine(AT_ONE_BUDGET["full"])
        | {
            "batch": AT_ONE_BUDGET["full"].batch | {"lexical": 8},  # there are 2,660 words to train on
            "test": {"arithmetic": 1000, "lexical": 750, "dialogue": 500},
            "rounds": 60,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy.frontier", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2 directory, from examples/00_get_smollm2.py")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--tune", action="store_true", help="choose learning rates and scales, and stop there")
    parser.add_argument("--work", type=Path, default=Path("build/frontier"), help="where runs are kept")
    parser.add_argument("--resume", type=Path, nargs="+", default=[], metavar="FILE", help="frontier-*.json whose runs are not done again")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where frontier-PRESET.json and its plot go")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    try:
        made_with = claim(options.work, options.base)
        resumed = elsewhere(options.work, [where for file in options.resume for where in resume(file, made_with, options.work)])
    except (OSError, ValueError, FloraExportError) as error:
        parser.error(str(error))
    head = {"command": shlex.join(["python", "-m", "benchmarks.accuracy.frontier", *sys.argv[1:]]), "preset": asdict(preset)}
    tail = {"made_with": made_with, "environment": environment(), "resumed": resumed}
    options.output.mkdir(parents=True, exist_ok=True)
    place = options.output / f"frontier-{options.preset}.json"
    tuning = place.with_name(f"frontier-{options.preset}-tuning.json")
    if options.tune or not tuning.is_file():
        _write(tuning, head | tune(preset, options.base, options.work) | tail)
    if options.tune:
        return
    settings = json.loads(tuning.read_text())["chosen"]
    result = head | {"tuned": tuning.name} | judge(preset, settings, options.base, options.work) | tail
    if preset.test:
        result["summary"] = summarise(result)
        result["table"] = markdown(result["summary"])
        plot(result["summary"], place.with_suffix(".svg"))
        print(result["summary"]["advice"])
    else:
        result["table"] = validation_table(result["runs"], named(preset.arms[0]))
    _write(place, result)
    print("\n".join(result["table"]))


def resume(file: Path, made_with: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """Keep the runs of a result in `work`, as if they had been made there. Returns the environments that they were made in.

    Raises:
        ValueError: they were made with another base, other versions, another device or other code, or the file is no frontier's result.
    """
    result = json.loads(file.read_text())
    if differ := differing(result.get("made_with", {}), made_with):
        raise ValueError(f"{file}: its runs were made with another {differ}, and cannot be resumed")
    for record in result["tried" if "tried" in result else "runs"]:
        fit = Fit(**record["fit"])
        validation = result["preset"]["validation"][fit.task] if "validation_loss" in record else 0
        keep(Run(fit, validation, len(record.get("scores", []))), record, work)
    return [result["environment"], *result.get("resumed", [])]


def _write(place: Path, result: dict[str, Any]) -> None:
    place.write_text(json.dumps(result, indent=1) + "\n")


def named(arm: Arm) -> str:
    return f"{arm[0]} {arm[1]}"


def _fit(preset: Frontier, arm: Arm, task: str, seed: int, rate: float, scale: float) -> Fit:
    return Fit(arm[0], task, rate, seed, preset.steps, preset.batch[task], rank=arm[1], scale=scale)


def tune(preset: Frontier, base: Path, work: Path) -> dict[str, Any]:
    """A learning rate and a factor on alpha for every arm and task: the rate first, then the factor at that rate; one seed."""
    cells = [(arm, task) for arm in preset.arms for task in TASKS]

    def tried(settings: Sequence[tuple[Arm, str, float, float]]) -> list[dict[str, Any]]:
        runs = [Run(_fit(preset, arm, task, TUNING_SEED, rate, scale), preset.validation[task]) for arm, task, rate, scale in settings]
        return run_all(runs, base, work, preset.workers, preset.threads)

    records = tried([(*cell, rate, 1.0) for cell in cells for rate in preset.rates])
    while beyond := list(_beyond(records)):  # an end of the list is no optimum
        records += tried([(*cell, rate, 1.0) for cell, rate in beyond])
    best = _lowest(records)
    records += tried([(arm, task, best[arm, task][0], scale) for arm, task in cells for scale in preset.scales])
    return {"tried": records, "chosen": chosen(records, preset.arms)}


def chosen(tried: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> Chosen:
    best = _lowest(tried)
    return {named(arm): {task: list(best[arm, task]) for task in TASKS} for arm in arms}


def _beyond(records: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[Arm, str], float]]:
    """(arm, task), and the rate beyond the best one where that is the highest or the lowest tried: twice it, or half."""
    for cell, (rate, _) in _lowest(records).items():
        tried = [r["fit"]["learning_rate"] for r in records if ((r["fit"]["method"], r["fit"]["rank"]), r["fit"]["task"]) == cell]
        if rate in (max(tried), min(tried)):
            yield cell, 2 * rate if rate == max(tried) else rate / 2


def _lowest(records: Sequence[dict[str, Any]]) -> dict[tuple[Arm, str], tuple[float, float]]:
    """(arm, task) -> the learning rate and the factor with the lowest loss on validation."""
    best: dict[tuple[Arm, str], dict[str, Any]] = {}
    for record in records:
        fit = record["fit"]
        cell = (fit["method"], fit["rank"]), fit["task"]
        if cell not in best or loss(record) < loss(best[cell]):
            best[cell] = record
    return {cell: (record["fit"]["learning_rate"], record["fit"]["scale"]) for cell, record in best.items()}


def judge(preset: Frontier, settings: Chosen, base: Path, work: Path) -> dict[str, Any]:
    """Every arm with every seed, on test examples; the base once; and what every arm costs. Without test examples, on validation alone."""
    runs = [
        Run(_fit(preset, arm, task, seed, *settings[named(arm)][task]), preset.validation[task], preset.test.get(task, 0))
        for seed in preset.seeds
        for arm in preset.arms
        for task in TASKS
    ]
    runs += [Run(_fit(preset, ("base", 0), task, TUNING_SEED, 0.0, 1.0), 0, preset.test[task]) for task in preset.test]
    records = run_all(runs, base, work, preset.workers, preset.threads)
    result = {"runs": records, "process_seconds": round(sum(record["seconds"] for record in records))}
    if preset.test:
        threads = min(os.cpu_count() or 1, preset.workers * preset.threads)
        result["latency"] = latency(preset.arms, base, work, preset.rounds, threads)
    return result


if __name__ == "__main__":
    main()
