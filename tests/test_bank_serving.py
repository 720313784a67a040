"""A bank at the edge: `flora-export generate` in our decoder and in ONNX Runtime GenAI, and a Triton repository without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.bank import LAYOUTS
from flora_export.cli import main
from flora_export.errors import FloraExportError
from flora_export.generate import generate
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.prompts import load_tokenizer
from tests.conftest import silent
from tests.families import make_adapter, make_speaking_base

pytest.importorskip("onnxruntime_genai", reason="extra genai is not installed")

NAMES = ("first", "second", "third")
WHO = (*NAMES, "base")
QUESTION = "what is the answer?"
STEPS = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[tuple[str, Path], ...]]:
    """A base that has a tokenizer, and three adapters of it; their ranks differ."""
    root = tmp_path_factory.mktemp("bank")
    base = make_speaking_base(root / "base")
    return base, tuple(
        (name, make_adapter(base, root / name, seed=seed, r=4 * seed, alpha=32.0 * seed)) for seed, name in enumerate(NAMES, start=1)
    )


@pytest.fixture(scope="module", params=LAYOUTS)
def bank(
    request: pytest.FixtureRequest, sources: tuple[Path, tuple[tuple[str, Path], ...]], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    base, members = sources
    options = BuildOptions(bank=BankOptions(members, layout=request.param))
    return build(members[0][1], str(base), tmp_path_factory.mktemp(request.param) / "out", options, silent)[0]


@pytest.fixture(scope="module")
def single(sources: tuple[Path, tuple[tuple[str, Path], ...]], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base, members = sources
    return build(members[0][1], str(base), tmp_path_factory.mktemp("single") / "out", BuildOptions(verify=False), silent)[0]


def greedy(bank: Artifact, who: str, prompt: str, steps: int, end: int = 2) -> str:
    """What an adapter of the bank answers, alone in our own decoder."""
    tokenizer, decoder = load_tokenizer(bank.path), Decoder(bank)
    assert bank.manifest.bank is not None
    decoder.choice.choose(bank.manifest.bank.slot(who))
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    answer = [int(decoder.start([tokenizer(text, add_special_tokens=False)["input_ids"]])[0][-1].argmax())]
    while answer[-1] != end and len(answer) < steps:
        answer.append(int(decoder.step([answer[-1]])[0].argmax()))
    return str(tokenizer.decode([token for token in answer if token != end], skip_special_tokens=True))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_each_prompt_has_its_own_adapter(bank: Artifact) -> None:
    """One question to all, and questions of other lengths, in mixed batches: GenAI and our decoder answer as each adapter does alone."""
    wanted = {who: greedy(bank, who, QUESTION, STEPS) for who in WHO}
    assert len(set(wanted.values())) == len(WHO)
    for runtime, name in (("auto", "genai"), ("genai", "genai"), ("decoder", "ONNX Runtime")):
        for order in (WHO, WHO[::-1]):
            answers = generate(bank, [QUESTION] * len(order), max_new_tokens=STEPS, adapters=order, runtime=runtime)
            assert [answer.text for answer in answers] == [wanted[who] for who in order]
            assert [answer.adapter for answer in answers] == list(order)
            assert all(answer.runtime.startswith(name) for answer in answers)
        for who in WHO:
            (answer,) = generate(bank, [QUESTION], max_new_tokens=STEPS, adapters=[who], runtime=runtime)
            assert answer.text == wanted[who]
        ragged = {"you": "second", "what is the question, you ask?": "base", "say": "third", "the answer is what you say": "second"}
        answers = generate(bank, list(ragged), max_new_tokens=STEPS, adapters=list(ragged.values()), runtime=runtime)
        assert [answer.text for answer in answers] == [greedy(bank, who, prompt, STEPS) for prompt, who in ragged.items()]
        (bare,) = generate(bank, [QUESTION], max_new_tokens=STEPS, adapter=False, runtime=runtime)
        assert (bare.text, bare.adapter) == (wanted["base"], "base")


def test_the_command(bank: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", bank.path, QUESTION, QUESTION, "--max-new-tokens", STEPS, "--json"]
    wanted = {who: greedy(bank, who, QUESTION, STEPS) for who in WHO}
    result = run(*command, "--adapter", "third", "--adapter", "base")
    assert result.exit_code == 0, result.stderr
    assert [(a["adapter"], a["text"]) for a in json.loads(result.stdout)["answers"]] == [(who, wanted[who]) for who in ("third", "base")]
    for extra, who in ((["--adapter", "second"], "second"), (["--without-adapter"], "base")):
        answers = json.loads(run(*command, *extra).stdout)["answers"]
        assert [(a["adapter"], a["text"], a["runtime"]) for a in answers] == [(who, wanted[who], "genai")] * 2
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    answers = json.loads(run(*command, "--adapter", "first", "--adapter", "third").stdout)["answers"]
    assert [a["text"] for a in answers] == [wanted["first"], wanted["third"]]
    assert all(a["runtime"].startswith("ONNX Runtime") for a in answers)
    assert run(*command, "--adapter", "first", "--runtime", "genai").exit_code == 3


def test_it_must_be_said_who_answers(bank: Artifact, single: Artifact) -> None:
    there_are = "first, second, third, base"
    for extra, message in (
        ([], f"once for all prompts or once for each, in order (it was given 0 times for 3). There are {there_are}"),
        (["--adapter", "first"] * 2, "(it was given 2 times for 3)"),
        (["--adapter", "fourth"], f"there is no adapter 'fourth'; there are {there_are}"),
        (["--adapter", "first", "--without-adapter"], "give one of the two"),
    ):  # fmt: skip
        result = run("generate", bank.path, "a", "b", "c", *extra)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    for who in ("first", "base"):
        result = run("generate", single.path, "a", "--adapter", who)
        assert (result.exit_code, "is no bank, so there is none to choose" in result.stderr) == (2, True), result.stderr
    assert run("generate", single.path, "a", "--max-new-tokens", 1).exit_code == 0
    with pytest.raises(FloraExportError, match="is a bank: say who answers"):
        generate(bank, ["a"], max_new_tokens=1)


def test_genai_is_told_of_no_input_that_it_does_not_know(bank: Artifact) -> None:
    """Its configuration would be refused; the manifest says what the graph takes."""
    config = json.loads((bank.path / "genai_config.json").read_text())
    assert "adapter_ids" not in config["model"]["decoder"]["inputs"]
    assert open_artifact(bank.path).manifest.inputs[-1].name == "adapter_ids"
