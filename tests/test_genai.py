"""ONNX Runtime GenAI runs an artifact unchanged: eager's greedy tokens, one by one, and the command `generate` uses it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.base_model import load_base
from flora_export.cli import main
from flora_export.errors import BackendError
from flora_export.genai import GenaiTokens
from flora_export.generate import generate
from flora_export.pipeline import BuildOptions, build
from flora_export.reference import Reference
from flora_export.verify.prompts import load_tokenizer
from tests.conftest import silent
from tests.families import FAMILIES, GATED_FAMILIES, VOCABULARY, make_adapter, make_base

pytest.importorskip("onnxruntime_genai", reason="extra genai is not installed")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [12], [14, 0, 15, 16, 0, 17, 0], [1, 2]]
STEPS = 12


def until_end(tokens: list[int], end: int = 2) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def run(artifact: Artifact, rows: list[list[int]]) -> list[list[int]]:
    source = GenaiTokens(artifact, {2}, rows)
    steps = [source.start(STEPS)]
    while len(steps) < STEPS and not all(2 in column for column in zip(*steps, strict=True)):
        steps.append(source.step())
    return [until_end(list(column)) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize(("family", "precision"), [*((family, "fp32") for family in GATED_FAMILIES), ("llama", "fp16")])
def test_tokens_are_those_of_eager_pytorch(bases: Callable[[str], Path], family: str, precision: str, tmp_path: Path) -> None:
    """A ragged batch and each prompt alone; prompts hold and end with the padding token (0), and end with the end token (2)."""
    base, checkpoint = bases(family), make_adapter(bases(family), tmp_path / "adapter")
    artifact, _ = build(checkpoint, str(base), tmp_path / "out", BuildOptions(precision=precision, verify=False), silent)
    truth = Reference(load_base(str(base)), checkpoint)
    expected = [until_end(truth.greedy([prompt], STEPS)[0]) for prompt in PROMPTS]
    assert run(artifact, PROMPTS) == expected
    assert [run(artifact, [prompt])[0] for prompt in PROMPTS] == expected


def with_tokenizer(base: Path) -> Path:
    """Give a Llama model a tokenizer with a letter for each token."""
    import transformers

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "▁": 4}
    letters = {chr(0x4E00 + token): token for token in range(len(special), VOCABULARY)}
    transformers.LlamaTokenizer(vocab=special | letters, merges=[], pad_token="<pad>").save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny base model with a tokenizer, an adapter, and their artifact."""
    root = tmp_path_factory.mktemp("spoken")
    base = with_tokenizer(make_base("llama", root / "base"))
    checkpoint = make_adapter(base, root / "adapter")
    build(checkpoint, str(base), root / "out", BuildOptions(), silent)
    return base, checkpoint, root / "out"


def test_generate_uses_it(spoken: tuple[Path, Path, Path]) -> None:
    base, checkpoint, out = spoken
    artifact, truth, tokenizer = open_artifact(out), Reference(load_base(str(base)), checkpoint), load_tokenizer(out)
    prompts = ["丅万丈三", "上下丌不与丏"]
    tokens = [until_end(truth.greedy([tokenizer(prompt)["input_ids"]], STEPS)[0]) for prompt in prompts]
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert all(len(text) > STEPS // 2 for text in expected)
    for runtime in ("auto", "genai", "decoder"):
        pieces: list[str] = []
        got = generate(artifact, prompts, max_new_tokens=STEPS, runtime=runtime, on_text=pieces.append)
        assert [answer.text for answer in got] == expected
        assert all(answer.runtime.startswith("ONNX Runtime" if runtime == "decoder" else "genai") for answer in got)
        assert "".join(pieces) == expected[0]
        assert max(map(len, pieces)) == 1  # each letter as it comes
    (bare,) = generate(artifact, prompts[:1], max_new_tokens=STEPS, adapter=False)
    assert bare.runtime.startswith("ONNX Runtime")
    assert bare.text != expected[0]


def test_the_command_says_which_it_was(spoken: tuple[Path, Path, Path]) -> None:
    arguments = ["generate", str(spoken[2]), "丅万", "--max-new-tokens", "4"]
    for runtime, name in (("auto", "genai"), ("decoder", "ONNX Runtime")):
        result = CliRunner().invoke(main, [*arguments, "--runtime", runtime, "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["answers"][0]["runtime"].startswith(name)
        assert f"(runtime {name}" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--runtime", "genai", "--without-adapter"])
    assert (result.exit_code, "use --runtime decoder" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('a system message must come first') }}", "TemplateError: a system message must come first"),
        ("{% if messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
    ],
)
def test_a_chat_template_that_refuses(spoken: tuple[Path, Path, Path], template: str, why: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(spoken[2], tmp_path / "out"))
    (out / "chat_template.jinja").write_text(template)
    arguments = ["generate", str(out), "丅万", "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert f"the artifact's chat template failed ({why}" in result.stderr and "--raw" in result.stderr
    assert CliRunner().invoke(main, [*arguments, "--raw"]).exit_code == 0


def test_where_it_is_not_installed(spoken: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    artifact = open_artifact(spoken[2])
    assert generate(artifact, ["丅"], max_new_tokens=2)[0].runtime.startswith("ONNX Runtime")
    with pytest.raises(BackendError, match=r"pip install 'flora-export\[genai\]'"):
        generate(artifact, ["丅"], max_new_tokens=2, runtime="genai")


def test_a_family_that_it_does_not_know(bases: Callable[[str], Path], tmp_path: Path) -> None:
    assert "starcoder2" in FAMILIES
    checkpoint = make_adapter(bases("starcoder2"), tmp_path / "adapter", mlp_activation="gelu")
    artifact, _ = build(checkpoint, str(bases("starcoder2")), tmp_path / "out", BuildOptions(verify=False), silent)
    with pytest.raises(BackendError, match=r"GenAI refuses .*--runtime decoder"):
        GenaiTokens(artifact, {2}, [[5]])
    (artifact.path / "genai_config.json").unlink()
    with pytest.raises(BackendError, match=r"with a genai_config\.json"):
        GenaiTokens(artifact, {2}, [[5]])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_artifact_answers(spoken: tuple[Path, Path, Path], tmp_path: Path, precision: str) -> None:
    """Its tokens are those that ONNX Runtime prefers in the same graph; where two are nearly tied, kernels of other shapes may choose."""
    base, checkpoint, _ = spoken
    artifact, _ = build(checkpoint, str(base), tmp_path / "out", BuildOptions(precision=precision), silent)
    decoder, seen = Decoder(artifact), 0
    for prompt in PROMPTS:
        logits = decoder.start([prompt])[0][-1]
        for token in run(artifact, [prompt])[0]:
            assert logits.max() - logits[token] <= 0.02 * np.abs(logits).max()
            logits, seen = decoder.step([token])[0], seen + 1
    assert seen > STEPS
