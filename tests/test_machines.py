"""The short form of `make machines`: verdicts and bytes do not depend on the processor. Tiny models; the setting that cuts everything."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts, not a package

import machines  # found on the path above

# Wrong artifacts that are nearest to passing, and one that is right.
NEAREST = "rounded or number or weak or rotary or weight"


def test_verdicts_and_bytes_are_the_same() -> None:
    cut = "all of these, the least of each"
    rows = machines.measure({name: machines.SETTINGS[name] for name in ("as the machine is", cut)}, None, NEAREST)
    assert len({row["artifacts"]["llama"]["sha256"] for row in rows.values()}) == 1
    assert rows[cut]["wrong_caught"] == rows[cut]["wrong"] == 5
    assert rows[cut]["right_passed"] == rows[cut]["right"] >= 1
    assert all(map(machines.good, rows.values())), rows
