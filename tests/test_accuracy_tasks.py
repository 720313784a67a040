"""The data of the accuracy benchmark: splits that share no content, right answers, scores that can fail, and short sequences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.accuracy.tasks import SPLITS, TASKS, Example
from benchmarks.accuracy.tasks.arithmetic import THREE_STEPS, TWO_STEPS
from benchmarks.accuracy.tasks.dialogue import held_out
from benchmarks.accuracy.tasks.dialogue_scenarios import SCENARIOS
from benchmarks.accuracy.tasks.lexical import GROUPS, table
from benchmarks.accuracy.tasks.make_lexical import WordNet, candidates, chosen

COUNTS = {"arithmetic": (3000, 1000, 1000), "lexical": (2300, 310, 600), "dialogue": (3000, 1000, 1000)}
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
CLASSES = [name for names in GROUPS.values() for name in names]


@cache
def drawn(task: str, seed: int) -> dict[str, list[Example]]:
    return {split: TASKS[task].examples(split, count, seed) for split, count in zip(SPLITS, COUNTS[task], strict=True)}


def literals(example: Example) -> tuple[int, ...]:
    """The numbers that the working takes from the question, sorted; every step is calculated again here."""
    steps, found, before = STEP.findall(example.answer), [], None
    for left, operator, right, result in steps:
        a, b = Fraction(left), Fraction(right)
        assert {"+": a + b, "-": a - b, "*": a * b}.get(operator, a / b) == int(result), example
        assert before is None or before in (left, right), f"a step that does not use the one before: {example}"
        found += [left, right] if before is None else [right if left == before else left]
        before = result
    assert 2 <= len(steps) <= 3
    assert example.answer.endswith(f"\nAnswer: {before}")
    assert not Counter(found) - Counter(re.findall(r"\d+", example.prompt)), f"a number that the question does not state: {example}"
    return tuple(sorted(map(int, found)))


def word(example: Example) -> str:
    """The word that is asked for, read from the prompt."""
    match = re.fullmatch(r"(?:An? )?(\w+) is a kind of", example.prompt)
    assert match is not None, example
    return match[1].casefold()


def summary(example: Example) -> str:
    """What is decided, whichever of the two who speak is who: the first name in it, and every other, have numbers."""
    names = list(dict.fromkeys(re.findall(r"^(\w+):", example.prompt, re.MULTILINE)))
    mentioned = sorted((name for name in names if name in example.answer), key=example.answer.index)
    return " ".join(sorted(names)) + re.sub("|".join(mentioned) or "$^", lambda name: f"{mentioned.index(name[0])}", example.answer)


CONTENT: dict[str, Callable[[Example], object]] = {"arithmetic": literals, "lexical": word, "dialogue": summary}


@pytest.mark.parametrize("task", TASKS)
def test_no_content_is_in_two_splits_whatever_the_seeds(task: str) -> None:
    content: dict[str, set[object]] = {split: set() for split in SPLITS}
    for seed in (0, 1, 2):
        for split, examples in drawn(task, seed).items():
            content[split].update(map(CONTENT[task], examples))
    for one, other in combinations(SPLITS, 2):
        assert not content[one] & content[other], (one, other)
    assert min(map(len, content.values())) >= 300  # there is something to share


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_different_and_a_seed_decides_them(task: str) -> None:
    examples = TASKS[task].examples
    first = examples("train", 200, 7)
    assert first == examples("train", 200, 7)
    assert first != examples("train", 200, 8)
    assert len({example.prompt for example in first}) == len(first) == 200
    assert all(example.answer[0] in " \n" and example.prompt == example.prompt.strip() for example in first)


@pytest.mark.parametrize("task", TASKS)
def test_an_unknown_split_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=rf"{task}: split is 'dev', but it must be one of train, validation, test"):
        TASKS[task].examples("dev", 1, 0)


def test_more_examples_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lexical: 5000 different examples of test asked for, but there are \d+: ask for fewer"):
        TASKS["lexical"].examples("test", 5000, 0)


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_scores_one_and_another_answer_less(task: str) -> None:
    examples, score = TASKS[task].examples("test", 200, 0), TASKS[task].score
    assert all(score(example.answer, example) == 1 for example in examples)
    for example, other in combinations(examples[:40], 2):
        if other.answer.split()[-1] != example.answer.split()[-1]:
            assert score(other.answer, example) < 1
        assert score("", example) == 0


def test_arithmetic_scores_the_stated_result() -> None:
    score, example = TASKS["arithmetic"].score, Example("", "\n12+7=19\n19-4=15\nAnswer: 15")
    assert score("\n12+7=19\n19-4=15\nAnswer: 15\nQuestion: 1+1? Answer: 2", example) == 1
    assert score("Nonsense. Answer: 15 apples", example) == score("12 + 7 - 4 = 15", example) == 1
    assert score("\n12+7=19\n19-4=15\nAnswer: 14", example) == score("Fifteen.", example) == 0


def test_every_arithmetic_template_occurs() -> None:
    prompts = " ".join(example.prompt for example in TASKS["arithmetic"].examples("test", 1000, 0))
    for text, _ in TWO_STEPS + THREE_STEPS:
        assert re.search(re.sub(r"\\{\w\\}", r"\\w+", re.escape(text)), prompts), text


def test_dialogue_scores_the_first_line_by_rouge_l() -> None:
    score, example = TASKS["dialogue"].score, Example("", " Anna and Ben will meet on Friday.")
    assert score("Anna and Ben will meet on Friday.\nAnna: Hi!", example) == 1
    # "anna and ben will meet on" is common: 6 of 7 and 6 of 7 words.
    assert score("Anna and Ben will meet on Monday", example) == pytest.approx(6 / 7)


def test_dialogues_say_what_their_summaries_say() -> None:
    for example in TASKS["dialogue"].examples("train", 500, 0):
        turns, _, end = example.prompt.rpartition("\n")
        assert end == "Summary:"
        assert 3 <= len(turns.splitlines()) <= 4
        said = {*re.findall(r"\w+", turns.casefold())}
        style = {*re.findall(r"\w+", " ".join(re.sub(r"{\w+}", "", scenario.summary) for scenario in SCENARIOS).casefold())}
        assert {*re.findall(r"\w+", example.answer.casefold())} <= said | style, example


def test_topics_that_are_held_out_are_in_the_test_split_alone() -> None:
    unseen = {topic for scenario in SCENARIOS for topic in scenario.slots["topic"] if held_out(topic)}
    texts = {split: "\n".join(e.prompt + e.answer for e in examples) for split, examples in drawn("dialogue", 0).items()}
    assert 0.1 < len(unseen) / sum(len(scenario.slots["topic"]) for scenario in SCENARIOS) < 0.3
    for topic in unseen:
        mention = re.compile(rf"\b{topic}\b", re.IGNORECASE)
        assert mention.search(texts["test"]), topic
        assert not mention.search(texts["train"]) and not mention.search(texts["validation"]), topic


def test_choices_hold_the_answer_once_and_a_near_one_in_no_favourite_place() -> None:
    places: Counter[int] = Counter()
    for example in (examples := TASKS["lexical"].examples("train", 2000, 0)):
        assert len({*example.choices}) == len(example.choices) == 4
        assert example.choices.count(example.answer) == 1
        assert table_of(example) == example.answer.strip()
        (near,) = (names for names in GROUPS.values() if example.answer.strip() in names)
        assert sum(choice.strip() in near for choice in example.choices) >= 2
        places[example.choices.index(example.answer)] += 1
    # Each place has a quarter: 500 of 2000, standard deviation 19; 5 of those.
    assert all(abs(places[place] - len(examples) / 4) < 100 for place in range(4)), places


def table_of(example: Example) -> str:
    return {entry.casefold(): category for entry, category in table().items()}[word(example)]


def test_the_table_has_one_class_for_a_word_and_no_word_in_another() -> None:
    rows = (Path(__file__).parent.parent / "benchmarks/accuracy/tasks/lexical.tsv").read_text(encoding="utf-8").splitlines()
    words = [row.split("\t")[0].casefold() for row in rows]
    assert len({*words}) == len(words) == len(rows) == len(table())
    assert {*table().values()} == {*CLASSES}
    assert len({*CLASSES}) == len(CLASSES)
    sizes = Counter(table().values()).values()
    assert min(sizes) >= 10 and max(sizes) <= 90
    known = {*words}
    for entry in words:
        parts = {entry[:cut] for cut in range(1, len(entry))} | {entry[cut:] for cut in range(1, len(entry))}
        assert not parts & known, entry
        assert not any(name in entry for name in CLASSES), entry


class OneToken:
    """A tokenizer to which every word is one token."""

    def encode(self, text: str, *, add_special_tokens: bool) -> OneToken:
        return self

    ids = (0,)


def test_words_come_from_first_senses_below_one_class(tmp_path: Path) -> None:
    """Kestrel is a bird; crane a bird and, in its second sense, a tool; hammer a tool, mallet its synonym; Plato a named individual."""
    data = [
        *(
            "1 03 n 01 bird 0 000 | b",
            "2 03 n 01 tool 0 000 | t",
            "3 05 n 01 kestrel 0 001 @ 1 n 0000 | k",
            "4 05 n 01 crane 0 001 @ 1 n 0000 | c",
        ),
        *(
            "5 06 n 01 crane 0 001 @ 2 n 0000 | c",
            "6 06 n 02 hammer 0 mallet 0 001 @ 2 n 0000 | h",
            "7 18 n 01 Plato 0 001 @i 1 n 0000 | p",
        ),
        *("8 05 n 01 robin 0 001 @ 3 n 0000 | r", "9 05 n 01 robin 0 000 | a thing of no class"),
    ]
    senses = {"bird": "1", "tool": "2", "kestrel": "3", "crane": "4 5", "hammer": "6", "mallet": "6", "plato": "7", "robin": "9 8"}
    filler = [f"{100 + place} 03 n 01 x 0 000 | x" for place in range(len(CLASSES))]
    (tmp_path / "data.noun").write_text("\n".join(["  1 the licence", *data, *filler]) + "\n")
    (tmp_path / "index.noun").write_text("".join(f"{w} n {len(o.split())} 0 {len(o.split())} 0 {o}\n" for w, o in senses.items()))
    (tmp_path / "cntlist.rev").write_text("kestrel%1:05:00:: 1 3\nkestrel%2:05:00:: 1 9\nhammer%1:06:00:: 1 1\n")
    wordnet = WordNet(tmp_path)
    assert wordnet.tags["kestrel"] == 3  # the noun's alone
    wordnet.anchors = lambda: {"1": "bird", "2": "tool"}  # type: ignore[method-assign]
    ranked = candidates(wordnet, OneToken())  # type: ignore[arg-type]
    assert ranked == {"bird": ["kestrel"], "tool": ["hammer"]}
    assert chosen({"bird": ["kestrel", "bluebird", "kestrels"], "tool": ["hammer"]}) == {"kestrel": "bird", "hammer": "tool"}


@pytest.mark.real
def test_sequences_are_short_and_classes_are_one_token(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    assert all(tokens(f" {name}") == 1 for name in CLASSES)
    for task, prompt, answer in (("arithmetic", 40, 28), ("lexical", 10, 1), ("dialogue", 55, 15)):  # means
        examples = TASKS[task].examples("train", 500, 0)
        assert sum(tokens(example.prompt) for example in examples) <= prompt * len(examples), task
        assert sum(tokens(example.answer) for example in examples) <= answer * len(examples), task
        if limit := TASKS[task].max_new_tokens:
            assert max(tokens(example.answer) for example in examples) < limit, task  # and the end-of-text token
