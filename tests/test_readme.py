"""The README quotes no number that a file does not back, and its relative links lead somewhere."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

from readme_tables import END, SECTIONS, START  # noqa: E402  # found on the path above


def decode_result() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    return result


@pytest.mark.parametrize("page", SECTIONS)
def test_the_measured_section_is_the_results(page: str) -> None:
    """`make readme-tables` writes it; no other number of a benchmark stands in the README."""
    assert (ROOT / page).read_text().split(START)[1].split(END)[0].strip() == SECTIONS[page]()


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
