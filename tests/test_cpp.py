"""The C++ example: the same tokens as Python, and the right exit code for each kind of damage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from flora_export.artifact import DATA, GOLDEN, MANIFEST, MODEL, Artifact, open_artifact, seal
from flora_export.backends.onnxruntime import Decoder
from flora_export.base_model import GENERATION, load_base
from flora_export.pipeline import BuildOptions, build
from flora_export.reference import Reference
from tests.conftest import silent
from tests.cpp import decode, greedy
from tests.families import make_adapter
from tests.mutate import edit, edit_graph, edit_manifest, scale_b

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [14, 15, 16, 17] * 8]
STEPS = 40


@pytest.fixture(scope="module", params=["fp32", "fp16", "int4"])
def artifact(request: pytest.FixtureRequest, base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """fp32 has GroupQueryAttention, whose cache stays in one buffer; fp16 the standard Attention, whose cache grows; int4
    quantized weights."""
    options = BuildOptions(precision=request.param)
    return build(adapter, str(base), tmp_path_factory.mktemp("cpp") / "out", options, silent)[0]


@pytest.fixture
def out(base: Path, adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage, of an artifact made once."""
    whole = tmp_path_factory.getbasetemp() / "cpp-whole"
    if not whole.exists():
        build(adapter, str(base), whole, BuildOptions(), silent)
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_tokens_are_those_of_python(flora_decode: Path, artifact: Artifact) -> None:
    ran = decode(flora_decode, artifact.path, "--tokens", STEPS, "--threads", 1, prompts=PROMPTS)
    assert ran.code == 0, ran.messages
    decoder = Decoder(artifact, threads=1)
    assert ran.tokens == [greedy(decoder, prompt, STEPS) for prompt in PROMPTS]
    assert ran.messages.count("golden prompt of") == 2
    assert "(TPOT)" in ran.messages


def test_rows_of_a_batch_end_by_themselves(flora_decode: Path, artifact: Artifact) -> None:
    """The first row fills the context after 8 tokens; the others go on, to an end token or to their own last place."""
    prompts = [[5] * 120, [12], [14, 15, 16, 17]]
    ran = decode(flora_decode, artifact.path, "--tokens", 1000, prompts=prompts)
    assert ran.code == 0, ran.messages
    decoder = Decoder(artifact, threads=1)
    assert ran.tokens == [greedy(decoder, prompt, 128 - len(prompt)) for prompt in prompts]
    assert len(ran.tokens[0]) == 8 < max(map(len, ran.tokens))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_are_those_of_eager_pytorch(flora_decode: Path, bases: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    """Mistral here has a window of 8 tokens, shorter than the buffer. Without its adapter the model says something else."""
    base, checkpoint = bases(family), make_adapter(bases(family), tmp_path / "adapter")
    built, _ = build(checkpoint, str(base), tmp_path / "out", BuildOptions(), silent)
    ran = decode(flora_decode, built.path, "--tokens", STEPS, prompts=PROMPTS)
    assert ran.code == 0, ran.messages
    truth = Reference(load_base(str(base)), checkpoint)
    expected = [[*truth.greedy([prompt], STEPS)[0], 2] for prompt in PROMPTS]
    assert ran.tokens == [tokens[: tokens.index(2)] for tokens in expected]
    bare = Decoder(built, adapter=False)
    assert all(tokens != greedy(bare, prompt, STEPS) for tokens, prompt in zip(ran.tokens, PROMPTS, strict=True))


def test_recorded_prompts_are_the_default(flora_decode: Path, out: Path) -> None:
    recorded = load_file(out / GOLDEN)
    ran = decode(flora_decode, out)
    assert ran.tokens == [recorded[f"prompt.{i}.tokens"].tolist() for i in range(2)]


def test_bf16_logits(flora_decode: Path, out: Path) -> None:
    """No graph for the CPU has bf16 weights, but one may return bf16."""

    def cast(graph: ir.Graph) -> None:
        logits = graph.outputs[0]
        wide, logits.name = logits, "logits.wide"
        node = ir.node("Cast", [wide], attributes={"to": ir.DataType.BFLOAT16})
        node.outputs[0].name, node.outputs[0].shape = "logits", wide.shape
        node.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
        graph.append(node)
        graph.outputs[0] = node.outputs[0]

    edit_graph(out, cast)
    assert decode(flora_decode, out).code == 1  # the tolerance of fp32
    edit_manifest(out, precision="bf16")
    ran = decode(flora_decode, out)
    assert ran.code == 0, ran.messages


def test_an_unlisted_generation_configuration_is_not_read(flora_decode: Path, out: Path) -> None:
    (out / GENERATION).write_text(json.dumps({"eos_token_id": list(range(128))}))  # each token would end the answer
    seal(out, open_artifact(out).manifest)
    assert decode(flora_decode, out, prompts=PROMPTS).tokens == [[]] * len(PROMPTS)
    unlisted(GENERATION)(out)
    ran = decode(flora_decode, out, prompts=PROMPTS)
    assert (ran.code, all(ran.tokens)) == (0, True), ran.messages


def flip(name: str) -> Callable[[Path], None]:
    """Change one byte in the middle of a file."""

    def damage(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)

    return damage


def manifest(**changes: Any) -> Callable[[Path], None]:
    """Change the manifest's top level."""

    def damage(out: Path) -> None:
        (out / MANIFEST).write_text(json.dumps(json.loads((out / MANIFEST).read_text()) | changes))

    return damage


def forged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage whose hash the manifest states, so that only what reads the file can notice."""

    def damage(out: Path) -> None:
        change(out)
        seal(out, open_artifact(out).manifest)

    return damage


def header(text: str, length: int | None = None) -> Callable[[Path], object]:
    """Golden vectors with this header, and with this as its length."""
    content = struct.pack("<Q", len(text) if length is None else length) + text.encode()
    return lambda out: (out / GOLDEN).write_bytes(content)


def other_logits(value: float) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        tensors = {name: np.array(tensor) for name, tensor in load_file(out / GOLDEN).items()}
        tensors["prompt.1.logits"][3, 5] = value
        save_file(tensors, out / GOLDEN)

    return change


def largest_logit(graph: ir.Graph) -> None:
    """Let the graph return one number instead of logits."""
    logits = graph.outputs[0]
    logits.name = "logits.all"
    node = ir.node("ReduceMax", [logits], attributes={"keepdims": 0})
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "logits", ir.Shape([]), logits.type
    graph.append(node)
    graph.outputs[0] = node.outputs[0]


def configure(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json and forge its hash."""
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    seal(out, open_artifact(out).manifest)


def another_file(out: Path) -> None:
    manifest(files=open_artifact(out).manifest.files | {"../x": {"sha256": "", "bytes": 0}})(out)


def unlisted(name: str) -> Callable[[Path], object]:
    """Leave a file where it is, but take it out of the manifest."""

    def damage(out: Path) -> None:
        files = open_artifact(out).manifest.files
        assert (out / name).is_file() and name in files
        manifest(files={key: known for key, known in files.items() if key != name})(out)

    return damage


def newer_runtime(out: Path) -> None:
    known = open_artifact(out).manifest
    seal(out, dataclasses.replace(known, versions=known.versions | {"onnxruntime": "99.0.0"}))


TENSOR = '{"prompt.0.input_ids": {"dtype": "%s", "shape": %s, "data_offsets": %s}}'
DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a weight": (flip(DATA), 2, "model.onnx.data is not the file that was built"),
    "a golden vector": (flip(GOLDEN), 2, "golden.safetensors is not the file that was built"),
    "no manifest": (lambda out: (out / MANIFEST).unlink(), 2, "manifest.json cannot be read"),
    "half a manifest": (lambda out: (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes()[:999]), 2, "manifest.json is not JSON"),
    "no configuration": (lambda out: (out / "config.json").unlink(), 2, "config.json is missing"),
    "no golden vectors": (forged(lambda out: (out / GOLDEN).unlink()), 2, "built with --no-verify"),
    "unlisted golden vectors": (unlisted(GOLDEN), 2, "manifest.json lists no golden.safetensors"),
    "schema version": (manifest(schema_version=2), 2, "schema version 2, but this program reads 1"),
    "no files": (manifest(files={}), 2, "not what flora-export writes"),
    "a path": (another_file, 2, "names '../x', which leaves the directory"),
    "target": (manifest(target="cuda"), 3, 'is for "onnxruntime" on "cuda"'),
    "an older runtime": (newer_runtime, 3, "built with ONNX Runtime 99.0.0"),
    "no graph": (forged(lambda out: (out / MODEL).write_bytes(b"x" * 1000)), 3, "model.onnx"),
    "an empty file": (forged(lambda out: (out / GOLDEN).write_bytes(b"")), 2, "too short"),
    "a long header": (forged(header("{}", 2**63)), 2, "header would have 9223372036854775808 bytes"),
    "a header cut off": (forged(header(TENSOR[:30])), 2, "golden.safetensors is damaged"),
    "no tensors": (forged(header("{}")), 2, "has no tensor prompt.0.input_ids"),
    "offsets": (forged(header(TENSOR % ("I64", "[1]", "[0, 8]"))), 2, "lies outside the file"),
    "offsets backwards": (forged(header(TENSOR % ("I64", "[1]", "[8, 0]"))), 2, "lies outside the file"),
    "a shape": (forged(header(TENSOR % ("I64", "[3]", "[0, 0]"))), 2, "another size than its shape"),
    "a huge shape": (forged(header(TENSOR % ("I64", "[4294967296, 4294967296]", "[0, 0]"))), 2, "too large"),
    "a dtype": (forged(header(TENSOR % ("F64", "[0]", "[0, 0]"))), 2, "another dtype"),
    "no prompt": (forged(header(TENSOR % ("F32", "[0]", "[0, 0]"))), 2, "is F32, but must be I64"),
    "an expected logit": (forged(other_logits(1e3)), 1, "golden vectors do not replay"),
    "NaN": (forged(other_logits(float("nan"))), 1, "golden vectors do not replay"),
    "infinity": (forged(other_logits(float("inf"))), 1, "golden vectors do not replay"),
    "logits without dimensions": (lambda out: edit_graph(out, largest_logit), 2, "gives logits of rank 0"),
    "no adapter": (lambda out: edit(out, scale_b(0.0), forge=True), 1, "golden vectors do not replay"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(flora_decode: Path, out: Path, name: str) -> None:
    damage, code, message = DAMAGE[name]
    damage(out)
    ran = decode(flora_decode, out)
    assert (ran.code, ran.tokens) == (code, []), ran.messages
    assert "error: " in ran.messages and message in ran.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "5,x"], "'x' is not a whole number"),
        (["--prompt", "-5"], "is not a whole number"),
        (["--prompt", ""], "a prompt of 0 tokens"),
        (["--prompt", "5,128"], "token 128 is not one of the model's 128"),
        (["--prompt", ",".join(["5"] * 128)], "leave room in a context of 128"),
        (["--tokens", "0"], "usage"),
        (["--threads"], "--threads is not understood"),
        (["--speed", "9"], "--speed is not understood"),
    ],
)
def test_wrong_use(flora_decode: Path, out: Path, options: list[str], message: str) -> None:
    ran = decode(flora_decode, out, *options)
    assert ran.code == 2
    assert message in ran.messages


@pytest.mark.parametrize("value", [-1, 0, 1e30, 2**31, 2**64 - 1, 128.5, "128", True, None])
def test_a_context_that_is_no_number_of_tokens(flora_decode: Path, out: Path, value: object) -> None:
    configure(out, lambda config: config.update(max_position_embeddings=value))
    ran = decode(flora_decode, out, "--tokens", 10**18)
    assert (ran.code, ran.tokens) == (2, []), ran.messages
    assert "max_position_embeddings is " in ran.messages and "a whole number from 1 to 2147483647" in ran.messages


def test_a_context_that_is_not_stated(flora_decode: Path, out: Path) -> None:
    configure(out, lambda config: config.pop("max_position_embeddings"))
    ran = decode(flora_decode, out, "--tokens", 10**18, prompts=[[5] * 2048])
    assert ran.code == 2
    assert "leave room in a context of 2048" in ran.messages


def test_the_context_ends_the_answer(flora_decode: Path, out: Path) -> None:
    prompt = [5] * 120
    ran = decode(flora_decode, out, "--tokens", 1000, prompts=[prompt])
    assert ran.tokens == [greedy(Decoder(open_artifact(out)), prompt, 8)]
