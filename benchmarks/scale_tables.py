"""The README's tables of large bases and of fleets, from benchmarks/results/large.json and fleet.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHAPES = {"1b": ("Llama 3.2 1B", 16), "3b": ("Llama 3.2 3B", 28), "8b": ("Llama 3.1 8B", 32)}  # and their layers
BUILD = ("start", "reading the checkpoint", "capturing the base model", "fusing", "writing")  # phases before the verification


def large_table() -> list[str]:
    """A size a row: memory and seconds of a build, its verification included, and what a dry run had said of them."""
    result = json.loads((RESULTS / "large.json").read_text())
    lines = [
        "**Large bases** ([large.json](benchmarks/results/large.json)): random weights of these shapes in fp16,",
        f"rank {result['rank']}, built for ONNX Runtime in {result['precision']} and verified with `--quick`.",
        "Weights are mapped, not loaded; memory is beside the page cache; what `build --dry-run` had said stands in brackets.",
        "It does not see that files are read again and again where base, artifact and memory together are more than the machine has.",
        "",
        "| shape | layers | weights | memory of the build | of its verification | seconds of both | disk |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for asked, row in result["sizes"].items():
        phases, told = row["build"]["phases"], row["dry_run"]["cost"]
        memory = [max((p["anonymous_mib"] for name, p in phases.items() if (name in BUILD) == built), default=0) for built in (True, False)]
        name, whole = SHAPES[asked.partition(":")[0]]
        layers = f"{row['layers']}" if row["layers"] == whole else f"{row['layers']} of its {whole}"
        lines.append(
            f"| {name} | {layers} | {row['base_mib'] / 1024:.1f} GiB | {memory[0] / 1024:.2f} GiB "
            f"| {memory[1] / 1024:.2f} GiB ({told['memory'] / 2**30:.2f}) | {row['build']['seconds']:.0f} ({told['seconds']:.0f}) "
            f"| {row['artifact_mib'] / 1024:.2f} GiB ({told['disk'] / 2**30:.2f}) |"
        )
    return lines


def fleet_table() -> list[str]:
    """A set of adapters a row: a command for each, all in one process, and a fleet."""
    result = json.loads((RESULTS / "fleet.json").read_text())
    lines = [
        "**Fleets** ([fleet.json](benchmarks/results/fleet.json), [docs/fleet.md](docs/fleet.md)):",
        "all adapters built and verified, on two workers.",
        "",
        "| adapters | a command for each | one process | a fleet | the fleet again |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in (("tiny", "tiny"), ("smollm2", "of SmolLM2-135M")):
        row: dict[str, Any] = result[name]
        seconds = {arm: entry["seconds"] for arm, entry in row["arms"].items()}
        cells = [f"{seconds[arm]:.0f} s" for arm in ("alone", "in_turn", "fleet", "fleet_again")]
        lines.append(f"| {row['adapters']} {label} | " + " | ".join(cells) + " |")
    measured = [
        (result[name]["arms"][arm]["measured"], result[name]["adapters"]) for name in ("tiny", "smollm2") for arm in ("alone", "in_turn")
    ]
    one, turn, one_large, turn_large = (f"{some} of {all_}" for some, all_ in measured)
    return [
        *lines,
        "",
        f"A command for each was measured on {one} and {one_large}, one process on {turn} and {turn_large};",
        "the rest is as many times their mean.",
    ]
