"""The README quotes no number that a file does not back, and its relative links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARMS = {
    "fused": "FFBA fused (`--fuse both`)",
    "forward": "FFBA fused forward only",
    "backward": "FFBA fused backward only",
    "unfused": "FFBA unfused (`--fuse none`)",
    "lora": "LoRA of the same rank on all projections, unmerged",
    "eager": "FFBA unfused in eager PyTorch",
}
METRICS = (("tpot", 128), ("ttft", 128), ("total", 128))


def decode_result() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    return result


def measured_rows() -> list[str]:
    """The table's rows, from benchmarks/results/decode.json: an arm a row; decode, prefill and whole generation as ratios to base."""
    cells = {(m["arm"], m["metric"], m["tokens"]): m for m in decode_result()["measurements"] if m["batch"] == 1}
    rows = []
    for arm, name in ARMS.items():
        ratios = [(m["ratio_to_base"], *m["ratio_interval"]) for m in (cells[(arm, *metric)] for metric in METRICS)]
        rows.append(f"| {name} | " + " | ".join(f"{ratio:.3f} ({low:.3f} to {high:.3f})" for ratio, low, high in ratios) + " |")
    return rows


def test_the_table_is_the_result() -> None:
    assert re.findall(r"^\|.*\d\.\d{3} to \d.*$", README, re.MULTILINE) == measured_rows()


def test_quoted_figures() -> None:
    build = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())
    training = json.loads((ROOT / "examples" / "01_train_ffba" / "adapter" / "training.json").read_text())
    text = " ".join(README.split())
    assert f"The fused model's weights are {decode_result()['bytes_ratio_to_base']['fused']:.3f} times the base's" in text
    assert f"A build takes {build['ratio_seconds']:.2f} times as long" in text
    assert f"at {build['ratio_memory']:.2f} times its peak memory" in text
    assert f"word problems from {training['exact_before']:.2f} to {training['exact_after']:.2f}" in text


def test_the_budgets_are_kept() -> None:
    """What the project promises of itself, on the machine where it was measured."""
    build = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())
    budget = decode_result()["budget"]
    assert build["ratio_seconds"] <= build["allowed"]["ratio_seconds"]
    assert build["ratio_memory"] <= build["allowed"]["ratio_memory"]
    assert (budget["metric"], budget["tokens"], budget["batch"], budget["max_overhead"]) == ("tpot", 128, 1, 0.03)
    assert budget["ratio"] <= 1 + budget["max_overhead"]


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_four_lines_of_extending_are_the_contributors() -> None:
    lines = re.findall(r"^- \*?\*?An? (?:backend|pass|adapter method|architecture).*$", README, re.MULTILINE)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(lines) == 4
    assert all(line.replace("**", "") in contributing for line in lines)
