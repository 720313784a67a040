"""Makes lexical.tsv from WordNet 3.0: python -m benchmarks.accuracy.tasks.make_lexical --tokenizer models/smollm2/tokenizer.json

WordNet comes from Debian's package wordnet-base, unless --wordnet names a folder with its data.noun, index.noun and cntlist.rev.
Words are taken class by class, the most often tagged first, then those of the fewest tokens; ties fall by a hash, not by the alphabet.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.accuracy.tasks.lexical import GROUPS, TABLE

WORDS_A_CLASS = 90
TOKENS_A_WORD = 3

# Class -> WordNet's synsets, as lemma.sense; the class's own name where it is not here. Whatever is below them belongs to the class.
SYNSETS = {
    "fish": "fish.1 fish.2",
    "fruit": "edible_fruit.1",
    "drink": "beverage.1",
    "garment": "clothing.1 footwear.1 footwear.2 headdress.1",
    "instrument": "musical_instrument.1",
    "metal": "metal.1 metal.2",
    "medicine": "medicine.2",
    "country": "country.1 country.2",
    "language": "natural_language.1",
    "game": "parlor_game.1 table_game.1 game_of_chance.1 child's_game.1 party_game.1 computer_game.1 card_game.1 board_game.1",
    "dance": "dance.3",
    "currency": "monetary_unit.1 coin.1",
    "religion": "religion.1 religion.2",
    "worker": "craftsman.1 laborer.1 employee.1 servant.1",
    "unit": "linear_unit.1 mass_unit.1 volume_unit.1 area_unit.1 time_unit.1 electromagnetic_unit.1",
    "god": "greco-roman_deity.1 norse_deity.1 hindu_deity.1 celtic_deity.1 egyptian_deity.1 semitic_deity.1",
}
NAMED = {*GROUPS["place"], "god", "language", "religion"}  # classes that an individual with a name may be in; persons' names are left out
UNFIT = {"ballock", "clit", "minge", "papoose", "penis", "rapist", "titty", "whoredom", "whoreson"}  # no words for everybody


class WordNet:
    """Nouns: synset -> (words, parents, is an individual); lemma -> synsets, first sense first; lemma -> how often texts were tagged so."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[str, tuple[list[str], list[str], bool]] = {}
        self.senses: dict[str, list[str]] = {}
        self.tags: Counter[str] = Counter()
        for line in _entries(folder / "data.noun"):
            offset, _, _, words, *rest = line.partition(" | ")[0].split()
            after = 2 * int(words, 16)
            pointers = [rest[after + 1 + 4 * i : after + 4 + 4 * i] for i in range(int(rest[after]))]
            parents = [(kind, target) for kind, target, part in pointers if part == "n" and kind in ("@", "@i")]
            self.synsets[offset] = (rest[0:after:2], [target for _, target in parents], any(kind == "@i" for kind, _ in parents))
        for line in _entries(folder / "index.noun"):
            lemma, _, count, *rest = line.split()
            self.senses[lemma] = rest[-int(count) :]
        for line in _entries(folder / "cntlist.rev"):
            key, _, count = line.split()
            lemma, _, kind = key.partition("%")
            self.tags[lemma] += int(count) * kind.startswith("1:")  # nouns

    def anchors(self) -> dict[str, str]:
        """Synset -> the class that it is the root of."""
        found = {}
        for category in (name for names in GROUPS.values() for name in names):
            for synset in SYNSETS.get(category, f"{category}.1").split():
                lemma, _, sense = synset.partition(".")
                found[self.senses[lemma][int(sense) - 1]] = category
        return found


def _entries(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]  # the licence is indented


def candidates(wordnet: WordNet, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Class -> its unambiguous words, the best known first."""
    anchors = wordnet.anchors()

    @cache
    def classes(synset: str) -> frozenset[str]:
        own = {anchors[synset]} if synset in anchors else set()
        return frozenset(own.union(*(classes(parent) for parent in wordnet.synsets[synset][1])))

    ranked = defaultdict(list)
    for lemma, senses in wordnet.senses.items():
        words, _, individual = wordnet.synsets[senses[0]]
        word = next((word for word in words if word.lower() == lemma and re.fullmatch(r"[A-Z]?[a-z]{2,}", word)), None)
        found = frozenset[str]().union(*map(classes, senses))
        if word is None or senses[0] in anchors or len(found) != 1 or not classes(senses[0]) or lemma in UNFIT:
            continue
        (category,) = found
        plural = lemma.endswith("s") and not re.search(r"(ss|us|is|os|as|ics)$", lemma) and category not in NAMED
        tokens = len(tokenizer.encode(f" {word}", add_special_tokens=False).ids)
        if (individual and category not in NAMED) or plural or tokens > TOKENS_A_WORD:
            continue
        ranked[category].append((-wordnet.tags[lemma], tokens, hashlib.sha256(word.encode()).hexdigest(), word, senses[0]))
    best: dict[str, list[str]] = defaultdict(list)
    seen = set()  # one word of a synset: theatre says what theater is
    for category, entries in ranked.items():
        for *_, word, synset in sorted(entries):
            if synset not in seen:
                best[category].append(word)
            seen.add(synset)
    return best


def chosen(ranked: dict[str, list[str]]) -> dict[str, str]:
    """Word -> class, in turns of the classes; no word begins or ends with another one, or tells the name of a class."""
    names = [name for names in GROUPS.values() for name in names]
    table: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for place in range(max(map(len, ranked.values()), default=0)):
        for category in names:
            if place >= len(ranked.get(category, ())) or counts[category] == WORDS_A_CLASS:
                continue
            word = ranked[category][place]
            low = word.casefold()
            others = (other.casefold() for other in table)
            if any(name in low for name in names) or any(_one_in_the_other(low, other) for other in others):
                continue
            table[word] = category
            counts[category] += 1
    return table


def _one_in_the_other(word: str, other: str) -> bool:
    long, short = (word, other) if len(word) > len(other) else (other, word)
    return long.startswith(short) or long.endswith(short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the base model: it says how rare a word is")
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun, index.noun and cntlist.rev")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if (wordnet := arguments.wordnet) is None:
            subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=folder, check=True)
            (package,) = Path(folder).glob("wordnet-base_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
            wordnet = Path(folder) / "usr" / "share" / "wordnet"
        table = chosen(candidates(WordNet(wordnet), Tokenizer.from_file(str(arguments.tokenizer))))
    rows = sorted(table.items(), key=lambda row: (row[1], row[0].casefold()))
    TABLE.write_text("".join(f"{word}\t{category}\n" for word, category in rows), encoding="utf-8")
    print(f"{TABLE}: {len(rows)} words in {len(set(table.values()))} classes")


if __name__ == "__main__":
    main()
