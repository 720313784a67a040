"""Summaries of short dialogues from a seeded generator: three or four turns of two people -> what they decided, in one sentence.

In each scenario (dialogue_scenarios.py) one detail is open: it is proposed and replaced, or an attempt to change it fails, so that only
the final decision belongs in the summary. Turns have several phrasings; a scenario has one style of summary. Templates, so far more
alike than a collection like SAMSum: this measures whether a model follows a decision and learns a style, not whether it can summarise.

What is decided (who, what, where and when: the summary) decides the split, so no summary is in two of them, nor one with its persons
swapped; and a fifth of the things that a dialogue can be about occurs in the test split alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from benchmarks.accuracy.tasks.dialogue_scenarios import NAMES, SCENARIOS, Scenario
from benchmarks.accuracy.tasks.task import Example, Task, distinct, seeded, split_of


def held_out(topic: str) -> bool:
    """A fifth of the topics is in the test split alone."""
    return split_of(f"topic {topic}") == "test"


def _details(rng: random.Random, scenario: Scenario) -> dict[str, str]:
    """A filler for every slot; `not_x` is another filler of slot x, never a topic that is held out."""
    details = dict(zip("abc", rng.sample(NAMES, 3), strict=True))
    for slot, fillers in scenario.slots.items():
        details[slot] = chosen = rng.choice(fillers)
        details[f"not_{slot}"] = rng.choice([other for other in fillers if other != chosen and not (slot == "topic" and held_out(other))])
    return details


def _words(text: str) -> list[str]:
    """Words alone: with them in a set, "Ben's" and "Anna." count as Ben and Anna, who may have swapped places."""
    return re.findall(r"\w+", text)


def _draw(rng: random.Random, split: str) -> Iterator[Example]:
    while True:
        scenario = rng.choice(SCENARIOS)
        details = _details(rng, scenario)
        summary = scenario.summary.format_map(details)
        if ("test" if held_out(details["topic"]) else split_of(f"dialogue {sorted({*_words(summary)})}")) != split:
            continue
        turns = [rng.choice(phrasings).format_map(details) for phrasings in rng.choice(scenario.flows)]
        speakers = (details["a"], details["b"])
        lines = [f"{speakers[place % 2]}: {turn[0].upper()}{turn[1:]}" for place, turn in enumerate(turns)]
        yield Example("\n".join([*lines, "Summary:"]), f" {summary}")


def examples(split: str, count: int, seed: int) -> list[Example]:
    """`count` different dialogues of a split. ValueError: no such split, or fewer than that."""
    return distinct("dialogue", split, count, _draw(seeded("dialogue", split, seed), split))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def score(text: str, example: Example) -> float:
    """ROUGE-L's F1 of the text's first line and the reference."""
    first = next(iter(text.strip().splitlines()), "")
    return float(_scorer().score(example.answer, first)["rougeL"].fmeasure)


DIALOGUE = Task("dialogue", "dialogue summaries", "rouge_l", 40, examples, score)
