"""Lexical knowledge, multiple choice: which of four everyday classes a noun belongs to ("A kestrel is a kind of" -> " bird").

The words and their classes are lexical.tsv, which make_lexical.py derives from WordNet 3.0; its licence is in lexical.LICENSE. A word is
there for its first sense, and only where none of its other senses is below another class; of synonyms, one is there. One choice at least
is of the right one's broad group. It is no public benchmark: the classes were chosen by hand, and the words range from common to rare.

The word decides the split, so that a synonym or a spelling of it is in no other; no word of the table begins or ends with another.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

from benchmarks.accuracy.tasks.task import Example, Task, distinct, seeded, split_of

TABLE = Path(__file__).with_name("lexical.tsv")

# Broad group -> classes. Every name is one token after a space, so that four choices differ in their first token, and in length not at all.
GROUPS = {
    "living": ("bird", "fish", "insect", "reptile", "mammal", "tree", "flower", "grass", "fungus"),
    "food": ("fruit", "vegetable", "drink", "bread", "cheese", "meat", "sauce", "candy"),
    "artifact": ("tool", "weapon", "vehicle", "garment", "furniture", "instrument", "building", "fabric", "room"),
    "matter": ("metal", "mineral", "medicine", "protein", "disease", "bone", "organ"),
    "place": ("city", "country", "river", "island", "lake", "state"),
    "person": ("athlete", "criminal", "musician", "relative", "ruler", "scientist", "worker", "writer"),
    "abstract": ("language", "game", "sport", "dance", "currency", "emotion", "color", "religion", "crime", "science", "unit", "god"),
}
# Written without an article: names, and what cannot be counted.
BARE = {*GROUPS["place"], "cheese", "meat", "sauce", "drink", "fabric", "metal", "mineral", "medicine", "protein", "disease"} | (
    {*GROUPS["abstract"]} - {"currency", "unit", "crime", "dance"}
)


@cache
def table() -> dict[str, str]:
    """Word -> class, in the table's order."""
    return dict(line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines())


def question(word: str, category: str) -> str:
    """The prompt for a word: with a or an by its sound, or bare."""
    if category in BARE:
        return f"{word[0].upper()}{word[1:]} is a kind of"
    vowel = re.match(r"[aeiou]|heir|herb|honor|hour", word.lower()) and not re.match(r"eu|ewe|one|uk|uni|ura|use|ut", word.lower())
    return f"{'An' if vowel else 'A'} {word} is a kind of"


def _choices(rng: random.Random, category: str) -> tuple[str, ...]:
    """The class, one of its group, and two of any, in a random order; each after a space."""
    near = next(names for names in GROUPS.values() if category in names)
    chosen = [category, rng.choice([name for name in near if name != category])]
    chosen += rng.sample([name for names in GROUPS.values() for name in names if name not in chosen], 2)
    rng.shuffle(chosen)
    return tuple(f" {name}" for name in chosen)


def examples(split: str, count: int, seed: int) -> list[Example]:
    """`count` different words of a split, each with four choices. ValueError: no such split, or fewer than that."""
    rng = seeded("lexical", split, seed)
    words = [(word, category) for word, category in table().items() if split_of(f"lexical {word.casefold()}") == split]
    rng.shuffle(words)
    drawn = (Example(question(word, category), f" {category}", _choices(rng, category)) for word, category in words)
    return distinct("lexical", split, count, drawn)


def score(text: str, example: Example) -> float:
    """1.0 where the chosen class is the right one."""
    return float(text.strip() == example.answer.strip())


LEXICAL = Task("lexical", "multiple-choice lexical knowledge", "accuracy", 0, examples, score)
