"""What a part of the campaign reports, and how much of it is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["short", "full"]  # short: seconds, in `make test`; full: what benchmarks/results/reliability.json holds


@dataclass
class Outcome:
    """One row of the table, one promise: how often it was tried, and every time it was broken.

    A loss is one sentence that says what was found, and the seed or trial that repeats it. `figures` go to the JSON file.
    `not_tried` has a sentence for each thing that this machine cannot try.
    """

    part: str
    promise: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    not_tried: list[str] = field(default_factory=list)
    seconds: float = 0.0
