"""The README quotes no number that a file does not back, and its relative links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARMS = {
    "fused": "FFBA fused (`--fuse both`)",
    "forward": "fused forward only",
    "backward": "fused backward only",
    "unfused": "unfused (`--fuse none`)",
}


def measured_rows() -> list[str]:
    """The table's rows, from benchmarks/results/decode.json."""
    result = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    rows = []
    for what, label in (("decode, past 128", "decode, 128 past tokens"), ("prefill 128", "prefill, 128 tokens")):
        for arm, name in ARMS.items():
            low, high = result[what][arm]["ratio_interval"]
            rows.append(f"| {label}: {name} | {result[what][arm]['ratio_to_base']:.3f} | {low:.3f} to {high:.3f} |")
    return rows


def test_the_table_is_the_result() -> None:
    assert re.findall(r"^\| (?:decode|prefill).*$", README, re.MULTILINE) == measured_rows()


def test_quoted_figures() -> None:
    build = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())
    decode = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    training = json.loads((ROOT / "examples" / "01_train_ffba" / "adapter" / "training.json").read_text())
    text = " ".join(README.split())
    assert f"The fused model's weights are {decode['bytes_ratio_to_base']['fused']:.3f} times the base's" in text
    assert f"A build takes {build['ratio_seconds']:.2f} times as long" in text
    assert f"at {build['ratio_memory']:.2f} times its peak memory" in text
    assert f"word problems from {training['exact_before']:.2f} to {training['exact_after']:.2f}" in text


def test_the_budgets_are_kept() -> None:
    """What the project promises of itself, on the machine where it was measured."""
    build = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())
    decode = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    assert build["ratio_seconds"] <= build["allowed"]["ratio_seconds"]
    assert build["ratio_memory"] <= build["allowed"]["ratio_memory"]
    assert decode["decode, past 128"]["fused"]["ratio_to_base"] <= decode["allowed"]["fused decode"]


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_four_lines_of_extending_are_the_contributors() -> None:
    lines = re.findall(r"^- \*?\*?An? (?:backend|pass|adapter method|architecture).*$", README, re.MULTILINE)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(lines) == 4
    assert all(line.replace("**", "") in contributing for line in lines)
