"""Arithmetic word problems from a seeded generator: question, short working, answer.

Train and test never share a problem: a problem's numbers decide its side (`is_test`), whatever names and things fill it.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace

NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack", "Kenji", "Lena")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "stamps", "stickers", "shells", "tickets")

# (text, working) with a, b, c numbers; the working's last result is the answer.
TEMPLATES = (
    ("{n} has {a} {t}. {m} gives {n} {b} more, and then {n} loses {c}. How many {t} does {n} have now?", "+-"),
    ("{n} buys {a} boxes with {b} {t} in each, and finds {c} more {t} at home. How many {t} does {n} have?", "*+"),
    ("There are {a} bags with {b} {t} in each. {n} takes {c} {t} out. How many {t} are left in the bags?", "*-"),
    ("{n} has {a} {t} and {m} has {b} {t}. Together they buy {c} more. How many {t} do they have together?", "++"),
    ("{n} had {a} {t}, gave {b} to {m} and sold {c}. How many {t} does {n} still have?", "--"),
)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # working, then the result: "12 + 7 = 19\n19 - 4 = 15\nAnswer: 15"
    result: int


def _apply(operator: str, left: int, right: int) -> int:
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def is_test(numbers: tuple[int, int, int]) -> bool:
    """One in ten triples of numbers belongs to the test side."""
    return random.Random(repr(numbers)).random() < 0.1


def problems(count: int, *, test: bool, seed: int) -> list[Problem]:
    """`count` different problems of one side, the same ones for the same seed."""
    rng, found = random.Random(f"{seed}-{test}"), {}
    while len(found) < count:
        text, operators = rng.choice(TEMPLATES)
        a, b, c = (
            (rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 20)) if "*" in operators else [rng.randint(5, 60) for _ in range(3)]
        )
        first = _apply(operators[0], a, b)
        result = _apply(operators[1], first, c)
        name, other = rng.sample(NAMES, 2)
        question = text.format(n=name, m=other, t=rng.choice(THINGS), a=a, b=b, c=c)
        if result < 0 or first < 0 or is_test((a, b, c)) != test:
            continue
        working = f"{a} {operators[0]} {b} = {first}\n{first} {operators[1]} {c} = {result}\nAnswer: {result}"
        found[question] = Problem(question, working, result)
    return list(found.values())


def with_facts(problem: Problem) -> Problem:
    """The same question, answered by what it states: {"people": [...], "things": "...", "numbers": [...]}."""
    words = re.findall(r"[A-Za-z]+|[0-9]+", problem.question)
    facts = {
        "people": list(dict.fromkeys(word for word in words if word in NAMES)),
        "things": next(word for word in words if word in THINGS),
        "numbers": [int(word) for word in words if word.isdecimal()],
    }
    return replace(problem, answer=json.dumps(facts))


def result_of(text: str) -> int | None:
    """The number that an answer states: the one after "Answer:", else the last number in it; None where there is none."""
    _, mark, tail = text.rpartition("Answer:")
    numbers = re.findall(r"-?\d+", tail if mark else text)
    return int(numbers[0] if mark and numbers else numbers[-1]) if numbers else None
