"""A bank at the edge: `flora-export generate` in our decoder and in ONNX Runtime GenAI, and a Triton repository without a server."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.triton.check import config_faults
from flora_export.backends.triton.config import Serving, Warmup, decoder_config, parse
from flora_export.backends.triton.program.generation import Job, Model, Piece, RequestError, Settings
from flora_export.backends.triton.program.scheduler import Scheduler
from flora_export.backends.triton.repository import check, live
from flora_export.bank import LAYOUTS, STACK
from flora_export.cli import main
from flora_export.errors import BackendError, FloraExportError
from flora_export.generate import generate
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.publish import generation_faults, publish
from flora_export.verify.prompts import load_tokenizer
from tests.conftest import silent
from tests.families import make_adapter, make_speaking_base

pytest.importorskip("tritonclient.grpc", reason="extra triton is not installed")

NAMES = ("first", "second", "third")
WHO = (*NAMES, "base")
QUESTION = "what is the answer?"
STEPS = 12


def make_members(root: Path) -> tuple[Path, tuple[tuple[str, Path], ...]]:
    """A base that has a tokenizer, and three adapters of it; their ranks differ."""
    base = make_speaking_base(root / "base")
    return base, tuple(
        (name, make_adapter(base, root / name, seed=seed, r=4 * seed, alpha=32.0 * seed)) for seed, name in enumerate(NAMES, start=1)
    )


def make_bank(root: Path, layout: str) -> Artifact:
    base, members = make_members(root)
    return build(members[0][1], str(base), root / "out", BuildOptions(bank=BankOptions(members, layout=layout)), silent)[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_bank(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[tuple[str, Path], ...]]:
    return make_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def single(members: tuple[Path, tuple[tuple[str, Path], ...]], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base, named = members
    return build(named[0][1], str(base), tmp_path_factory.mktemp("single") / "out", BuildOptions(), silent)[0]


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


# a Triton repository, without a server


@pytest.fixture(scope="module")
def repo(bank: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("published") / "repo"
    publish(bank, repo, Serving(), silent)
    return repo


def test_both_models_take_an_adapter(repo: Path, bank: Artifact, single: Artifact, tmp_path: Path) -> None:
    decoder, generating = (parse((repo / model / "config.pbtxt").read_text()) for model in ("decoder", "generate"))
    (ids,) = (tensor for tensor in decoder.input if tensor.name == "adapter_ids")
    assert (list(ids.dims), ids.HasField("reshape"), list(ids.reshape.shape)) == ([1], True, [])
    assert sum(tensor.HasField("reshape") for tensor in (*decoder.input, *decoder.output)) == 1
    (adapter,) = (tensor for tensor in generating.input if tensor.name == "adapter")
    assert (list(adapter.dims), adapter.optional) == ([1], True)
    golden = load_file(bank.path / "golden.safetensors")
    assert list(decoder.model_warmup[0].inputs["adapter_ids"].dims) == [1]
    assert np.array_equal(np.fromfile(repo / "decoder" / "warmup" / "1.adapter_ids", "<i8"), golden["prompt.0.adapter"])
    assert (repo / "generate" / "warmup" / "1.adapter").read_bytes()[4:] == b"first"
    assert check(repo) == []
    publish(single, tmp_path / "repo", Serving(), silent)
    for model in ("decoder", "generate"):
        assert "adapter" not in (tmp_path / "repo" / model / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("decoder", " reshape { shape: [] }", "", "input adapter_ids must have reshape { shape: [] }"),
        ("decoder", "reshape { shape: [] }", "reshape { shape: [1] }", "input adapter_ids must have reshape { shape: [] }"),
        ("decoder", "TYPE_INT64 dims: [-1]", "TYPE_INT64 dims: [-1] reshape { shape: [] }", "input input_ids must have no reshape"),
        (
            "decoder",
            '"adapter_ids" data_type: TYPE_INT64 dims: [1]',
            '"adapter_ids" data_type: TYPE_INT64 dims: [-1]',
            "[-1], but the model",
        ),
        ("generate", 'input { name: "adapter"', 'input { name: "lora"', "input adapter is missing"),
    ],
)
def test_faults_of_a_configuration(repo: Path, bank: Artifact, model: str, old: str, new: str, message: str) -> None:
    text = (repo / model / "config.pbtxt").read_text()
    assert old in text
    faults = config_faults(repo / model, bank.manifest, text.replace(old, new, 1))
    assert any(message in fault for fault in faults), faults


def test_the_form_for_tensorrt(bank: Artifact) -> None:
    """Written, not run by us."""
    engine = {"flavour": "tensorrt", "profiles": {name: {"batch": [1, 1, 4]} for name in ("prefill", "decode")}}
    manifest = dataclasses.replace(bank.manifest, backend="tensorrt", target="cuda", engine=engine)
    assert bank.manifest.bank is not None
    if bank.manifest.bank.layout == STACK:  # whose adapters are inputs of the engine
        with pytest.raises(BackendError, match="which no request gives"):
            decoder_config(manifest, 1, Serving(), Warmup({}, {}))
        return
    (ids,) = (t for t in parse(decoder_config(manifest, 1, Serving(), Warmup({}, {}))).input if t.name == "adapter_ids")
    assert (list(ids.dims), ids.HasField("reshape")) == ([1], True)


def test_a_golden_prompt_is_proved_with_its_own_adapter(bank: Artifact, tmp_path: Path) -> None:
    """Two of each adapter. Another adapter's name on any of them, and nothing goes live."""
    assert generation_faults(bank) == []
    count = 2 * len(NAMES)
    for index in range(count):
        out = Path(shutil.copytree(bank.path, tmp_path / str(index)))
        tensors = load_file(out / "golden.safetensors")
        tensors[f"prompt.{index}.adapter"] = (tensors[f"prompt.{index}.adapter"] + 1) % len(NAMES)
        save_file(tensors, out / "golden.safetensors")
        (fault,) = generation_faults(open_artifact(out))
        assert f"`generate` answers golden prompt {index} with token" in fault
    assert f"prompt.{count}.adapter" not in tensors


def test_build_for_triton(members: tuple[Path, tuple[tuple[str, Path], ...]], tmp_path: Path) -> None:
    base, named = members
    result = run("build", *(path for _, path in named), "--base", base, "--backend", "triton", "--output", tmp_path / "repo", "--json")
    assert result.exit_code == 0, result.stderr
    assert live(tmp_path / "repo") == {"decoder": 1, "generate": 1}
    assert open_artifact(tmp_path / "repo" / "generate" / "1").manifest.bank is not None


def test_a_bank_and_one_adapter_alone_follow_each_other(bank: Artifact, single: Artifact, tmp_path: Path) -> None:
    """In one repository: each version has its own inputs, and the live one's are checked."""
    for artifact in (single, bank, single):
        publish(artifact, tmp_path / "repo", Serving(), silent)
        assert check(tmp_path / "repo") == []
    assert run("triton", tmp_path / "repo", "--rollback").exit_code == 0
    assert check(tmp_path / "repo") == []
    assert 'name: "adapter"' in (tmp_path / "repo" / "generate" / "config.pbtxt").read_text()


class Client:
    """Collects what a job says."""

    def __init__(self, model: Model, text: str, **given: Any) -> None:
        settings = Settings.read(given)
        model.check_adapter(settings)
        self.text, self.error, self.done = "", "", threading.Event()
        self.job = Job(model, model.encode(text, None, settings), settings, self._send, self._fail, lambda: False)

    def _send(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.reason:
            self.done.set()

    def _fail(self, message: str, kind: str) -> None:
        self.error = message
        self.done.set()


def test_requests_of_all_adapters_take_turns(bank: Artifact) -> None:
    """A token of each in turn, 30 on their way at a time: each answer is its own adapter's."""
    model = Model(bank.path, threads=1)
    scheduler = Scheduler(model.decoder, 30)
    questions = [QUESTION, "say", "what is the question, you ask?"]
    wanted = {(who, question): greedy(bank, who, question, STEPS) for who in WHO for question in questions}
    assert all(len({wanted[who, question] for who in WHO}) == len(WHO) for question in questions)
    asked = list(itertools.product(WHO, questions)) * 5
    clients = [Client(model, question, adapter=who, max_tokens=STEPS, stream=n % 2 == 0) for n, (who, question) in enumerate(asked)]
    for client in clients:
        scheduler.submit(client.job)
    assert all(client.done.wait(60) for client in clients)
    scheduler.stop()
    assert [client.error for client in clients] == [""] * len(clients)
    assert [client.text for client in clients] == [wanted[pair] for pair in asked]


def test_a_server_does_not_guess(bank: Artifact, single: Artifact) -> None:
    held, alone = Model(bank.path, threads=1), Model(single.path, threads=1)
    with pytest.raises(RequestError, match=r"^adapter is missing; there are first, second, third, base$"):
        held.check_adapter(Settings.read({}))
    for name in ("fourth", "", "First", "0", "-1"):
        with pytest.raises(RequestError, match=f"^there is no adapter '{name}'; there are first, second, third, base$"):
            held.check_adapter(Settings.read({"adapter": name}))
    for name in WHO:
        held.check_adapter(Settings.read({"adapter": name}))
        with pytest.raises(RequestError, match="holds one adapter alone"):
            alone.check_adapter(Settings.read({"adapter": name}))
    alone.check_adapter(Settings.read({}))
    for wrong in (0, None, ["first"], True):
        with pytest.raises(RequestError, match=r"adapter is .* must be a name"):
            Settings.read({"adapter": wrong})
