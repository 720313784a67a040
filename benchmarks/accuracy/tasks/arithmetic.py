"""Arithmetic word problems from a seeded generator: question, a line of working for each step, answer.

Two steps mostly, three in a fifth of them: adding, taking away, multiplying, sharing and change from a note; some templates state a
number that does not matter. Generated from templates, so far more alike than a collection like GSM8K: this measures whether a model
learns to pick the numbers and to calculate, not whether it understands free text.

The numbers that the working takes from the question, in any order, decide the split, whatever names and things fill the template.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy.tasks.task import Example, Task, distinct, seeded, split_of

sys.path.append(str(Path(__file__).parents[3] / "examples" / "01_train_ffba"))  # a script's folder, not a package
from problems import NAMES, THINGS, result_of

# (text, operators): the steps are a·b, ·c, ·d from left to right; ~ takes the result from the next number; x does not matter.
TWO_STEPS = (
    ("{n} has {a} {t}. {m} gives {n} {b} more, and then {n} loses {c}. How many {t} does {n} have now?", "+-"),
    ("{n} has {a} {t} and {m} has {b}. Together they buy {c} more. How many {t} do they have?", "++"),
    ("{n} had {a} {t}, gave {b} to {m} and sold {c}. How many {t} does {n} still have?", "--"),
    ("{n} loses {b} of {a} {t} and then finds {c}. How many {t} does {n} have now?", "-+"),
    ("{n} buys {a} boxes with {b} {t} in each, and finds {c} more. How many {t} does {n} have?", "*+"),
    ("There are {a} bags with {b} {t} in each. {n} takes {c} {t} out. How many {t} are left?", "*-"),
    ("{n} buys {a} {t} for {b} dollars each and pays with {c} dollars. How much change does {n} get?", "*~"),
    ("{n} has {a} {t} and gets {b} more. {n} shares them equally among {c} friends. How many {t} does each get?", "+/"),
    ("{n} has {a} {t}, keeps {b}, and shares the others equally among {c} friends. How many {t} does each get?", "-/"),
    ("{n} packs {a} {t} into bags of {b} and sells each bag for {c} dollars. How many dollars does {n} get?", "/*"),
    ("{n} sells {a} {t} in the morning and {b} in the afternoon, for {c} dollars each. How many dollars is that?", "+*"),
    ("{n}, who is {x}, has {c} {t} and buys {a} packs of {b}. How many {t} does {n} have now?", "*+"),
    ("{n} walks {x} miles and buys {a} bags of {b} {t}. {m} takes {c}. How many {t} are left?", "*-"),
    ("{n} has {a} {t} and {x} cats. {m} has {b} more {t} than {n}, and buys {c}. How many {t} does {m} have?", "++"),
)
THREE_STEPS = (
    ("{n} has {a} {t}, finds {b}, loses {c} and buys {d} more. How many {t} does {n} have now?", "+-+"),
    ("{n} buys {a} packs of {b} {t}, gives {c} to {m} and finds {d}. How many {t} does {n} have?", "*-+"),
    ("{n} has {a} {t} and {m} has {b}. They lose {c} and share the rest among {d} friends. How many does each get?", "+-/"),
    ("{n} fills {a} boxes with {b} {t} each, loses {c}, and sells the rest for {d} dollars each. How many dollars is that?", "*-*"),
)


def _apply(operator: str, left: int, right: int) -> int:
    """One step; -1 where it has no whole, positive result."""
    if operator == "/":
        return left // right if left % right == 0 else -1
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _working(numbers: list[int], operators: str) -> list[str] | None:
    """A line for each step; None where a result is below 1 or above 400: no child's problem."""
    result, lines = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        left, sign, right = (number, "-", result) if operator == "~" else (result, operator, number)
        result = _apply(sign, left, right)
        if not 1 <= result <= 400:
            return None
        lines.append(f"{left}{sign}{right}={result}")
    return lines


def _numbers(rng: random.Random, operators: str) -> list[int]:
    """Small numbers next to * and /, up to 60 elsewhere; all at least 2, for the plural."""
    small = {place + side for place, operator in enumerate(operators) if operator in "*/" for side in (0, 1)}
    small -= {0} if operators[0] == "/" else set()
    return [rng.randint(2, 12 if place in small else 60) for place in range(len(operators) + 1)]


def _draw(rng: random.Random, split: str) -> Iterator[Example]:
    while True:
        text, operators = rng.choice(THREE_STEPS if rng.random() < 0.2 else TWO_STEPS)
        lines = None
        while lines is None:  # new numbers, not another text: every text is as frequent
            numbers = _numbers(rng, operators)
            lines = _working(numbers, operators) if split_of(f"arithmetic {sorted(numbers)}") == split else None
        name, other = rng.sample(NAMES, 2)
        question = text.format(n=name, m=other, t=rng.choice(THINGS), x=rng.randint(2, 60), **dict(zip("abcd", numbers, strict=False)))
        result = lines[-1].partition("=")[2]
        yield Example(f"Question: {question}\nWorking:", "\n" + "\n".join([*lines, f"Answer: {result}"]))


def examples(split: str, count: int, seed: int) -> list[Example]:
    """`count` different problems of a split. ValueError: no such split, or fewer than that."""
    return distinct("arithmetic", split, count, _draw(seeded("arithmetic", split, seed), split))


def score(text: str, example: Example) -> float:
    """1.0 where the stated result is the right one: the number after "Answer:", else the last number, before any further question."""
    return float(result_of(text.partition("Question:")[0]) == result_of(example.answer))


ARITHMETIC = Task("arithmetic", "arithmetic word problems", "exact", 48, examples, score)
