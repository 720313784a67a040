"""What a task is, and which split a piece of content belongs to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    prompt: str  # plain text, no chat template; no space at its end
    answer: str  # what is trained, without the end-of-text token; starts with " " or "\n"
    choices: tuple[str, ...] = ()  # all the answers of a multiple choice in a seeded order, each written as `answer` is


@dataclass(frozen=True)
class Task:
    name: str
    family: str
    metric: str  # "exact", "accuracy" or "rouge_l"
    max_new_tokens: int  # 0 where choices are scored by likelihood
    examples: Callable[[str, int, int], list[Example]]  # (split, count, seed) -> `count` different ones, the same for the same arguments
    score: Callable[[str, Example], float]  # (generated or chosen answer, example) -> 0..1


def split_of(content: str) -> str:
    """The one split of some content: 70 % train, 10 % validation, 20 % test, by a hash that no seed changes."""
    share = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def seeded(task: str, split: str, seed: int) -> random.Random:
    """The source of chance for one split of one task. ValueError: no such split."""
    if split not in SPLITS:
        raise ValueError(f"{task}: split is {split!r}, but it must be one of {', '.join(SPLITS)}")
    return random.Random(f"{task}-{split}-{seed}")


def distinct(task: str, split: str, count: int, drawn: Iterable[Example]) -> list[Example]:
    """The first `count` examples with different prompts.

    ValueError: there are fewer, by the end of `drawn` or after 1000 draws in which nothing was new.
    """
    found: dict[str, Example] = {}
    for example in _until_dry(found, drawn):
        found.setdefault(example.prompt, example)
        if len(found) >= count:
            break
    if len(found) < count:
        raise ValueError(f"{task}: {count} different examples of {split} asked for, but there are {len(found)}: ask for fewer")
    return list(islice(found.values(), count))


def _until_dry(found: dict[str, Example], drawn: Iterable[Example]) -> Iterator[Example]:
    size, since = 0, 0
    for example in drawn:
        yield example
        size, since = len(found), since + 1 if len(found) == size else 0
        if since == 1000:
            return
