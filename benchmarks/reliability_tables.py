"""The tables of docs/reliability.md, and the README's line of it, from benchmarks/results/reliability.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "reliability.json"


def reliability_section() -> str:
    """One row a promise, what this machine could not try, and what the served load delivered."""
    result = json.loads(RESULT.read_text())
    cpu, python = (result["environment"][key] for key in ("cpu", "python"))
    whole = f"in {result['seconds'] / 60:.0f} minutes" if result["seconds"] else "its parts one by one,"
    lines = [
        f"`make campaign`, {whole} on two shared cores ({cpu}, Python {python};",
        "[reliability.json](../benchmarks/results/reliability.json) has the counts of every row):",
        "",
        "| part | promise | tried | lost |",
        "| --- | --- | --- | --- |",
        *(f"| {p['part']} | {p['promise']} | {p['tried']:,} | {len(p['losses'])} |" for p in result["parts"]),
    ]
    lines += ["", *_served(result)]
    missing = [f"- {part['part']}: {sentence}" for part in result["parts"] for sentence in part["not_tried"]]
    return "\n".join([*lines, "", "Not tried on that machine:", "", *(missing or ["- nothing was left out."])])


def _served(result: dict[str, Any]) -> list[str]:
    loads = [part for part in result["parts"] if "tokens_per_second" in part["figures"]]
    rows = ["| served | p50 | p99 | longest | tokens/s, 1 client | tokens/s, 8 | gain |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for part in loads:
        figures, whole = part["figures"], part["figures"]["milliseconds"]["whole"]
        speeds = list(figures["tokens_per_second"].values())
        name = "SmolLM2-135M, fp32" if "SmolLM2" in part["part"] else "a tiny bank"
        times = " | ".join(f"{whole[p]:.0f} ms" for p in ("p50", "p99", "p100"))
        rows.append(f"| {name}, {part['tried']:,} requests | {times} | {speeds[0]:.0f} | {speeds[1]:.0f} | {figures['gain']:.2f} |")
    return rows


def reliability_paragraph() -> list[str]:
    """For the README's measured section."""
    result = json.loads(RESULT.read_text())
    tried, lost = (sum(numbers) for numbers in zip(*((p["tried"], len(p["losses"])) for p in result["parts"]), strict=True))
    promises = sum(part["tried"] > 0 for part in result["parts"])
    return [
        f"**Reliability**: {promises} promises were tried {tried:,} times by the campaign, and broken {lost} times",
        "([reliability.json](benchmarks/results/reliability.json), [docs/reliability.md](docs/reliability.md)).",
    ]
