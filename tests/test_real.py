"""The whole road on SmolLM2 with the committed adapter: build, prove, answer, and ONNX Runtime GenAI on the same directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from flora_export.artifact import GOLDEN, open_artifact
from flora_export.cli import main
from flora_export.generate import generate
from flora_export.verify.prompts import load_tokenizer
from tests.conftest import ADAPTER
from tests.cpp import decode

sys.path.insert(0, str(ADAPTER.parent))
from problems import problems, result_of

pytestmark = pytest.mark.real
QUESTION = "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?"

# Linux counts the peak of the program that starts another as the other's own, and this one may be large: a small one starts it instead.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def built(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The artifact, built and verified by the program itself, and its peak memory in KB without verification."""
    out = tmp_path_factory.mktemp("real") / "out"
    command = [
        sys.executable,
        "-m",
        "flora_export.cli",
        "build",
        str(ADAPTER),
        "--base",
        str(smollm2),
        "--backend",
        "onnxruntime",
        "--json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verified"] is True
    bare = [*command, "--no-verify", "--output", f"{out}-2"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *bare], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stderr
    return out, int(result.stdout)


def test_no_second_copy_of_the_weights(built: tuple[Path, int]) -> None:
    """The base has 538 MB, and mobius alone peaks at about 0.92 GB; a second copy would be 1.4."""
    assert built[1] < 1.2e6


def test_two_builds_are_byte_identical(built: tuple[Path, int]) -> None:
    """With and without verification the model is the same; the golden vectors differ, and the provenance, which says so."""
    one, two = (open_artifact(built[0].with_name(name)).manifest.files for name in (built[0].name, "out-2"))
    assert one.keys() - two.keys() == {GOLDEN}
    assert {name for name, known in two.items() if one[name] != known} == {"provenance.json"}


def test_explain_lists_every_adapter_tensor(built: tuple[Path, int]) -> None:
    result = CliRunner().invoke(main, ["explain", str(built[0]), "--json"])
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert {t["tensor"] for t in content["tensors"]} == load_file(ADAPTER / "adapter_model.safetensors").keys()
    assert content["operators"]["before"]["MatMul"] == content["operators"]["after"]["MatMul"] == 151


def test_golden_vectors_replay(built: tuple[Path, int]) -> None:
    assert CliRunner().invoke(main, ["verify", str(built[0])]).exit_code == 0


def test_the_adapter_answers_and_the_base_does_not(built: tuple[Path, int]) -> None:
    """Held-out problems as one ragged batch."""
    held_out = problems(8, test=True, seed=1)
    artifact = open_artifact(built[0])
    right = {}
    for adapter in (True, False):
        answers = generate(artifact, [problem.question for problem in held_out], max_new_tokens=64, adapter=adapter)
        right[adapter] = sum(result_of(a.text) == p.result for a, p in zip(answers, held_out, strict=True))
    assert right[True] >= 4
    assert right[False] <= 2


def test_generate_streams_text(built: tuple[Path, int]) -> None:
    result = CliRunner().invoke(main, ["generate", str(built[0]), QUESTION])
    assert result.exit_code == 0
    assert result.stdout == "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18\n"
    content = json.loads(CliRunner().invoke(main, ["generate", str(built[0]), QUESTION, "What is 3 + 4?", "--json"]).stdout)
    assert content["answers"][0]["text"] + "\n" == result.stdout
    assert len(content["answers"]) == 2
    raw = CliRunner().invoke(
        main, ["generate", str(built[0]), "The capital of France is", "--raw", "--without-adapter", "--max-new-tokens", "3"]
    )
    assert "Paris" in raw.stdout
    too_long = CliRunner().invoke(main, ["generate", str(built[0]), "word " * 9000])
    assert too_long.exit_code == 2
    assert "context of 8192" in too_long.stderr


def test_cpp_decodes_what_eager_did(built: tuple[Path, int], flora_decode: Path) -> None:
    """The recorded tokens are eager PyTorch's."""
    recorded = load_file(built[0] / GOLDEN)
    ran = decode(flora_decode, built[0], "--threads", 2)
    assert ran.code == 0, ran.messages
    assert ran.tokens == [recorded[f"prompt.{i}.tokens"].tolist() for i in range(2)]
    tokenizer = load_tokenizer(built[0])
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    (answer,) = decode(flora_decode, built[0], "--tokens", 64, prompts=[prompt]).tokens
    assert tokenizer.decode(answer) == "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18"


def test_onnxruntime_genai_runs_the_directory_unchanged(built: tuple[Path, int]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="extra genai is not installed")
    tokenizer = load_tokenizer(built[0])
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    model = genai.Model(str(built[0]))
    prompt = genai.Tokenizer(model).encode(text)
    assert list(prompt) == tokenizer(text, add_special_tokens=False)["input_ids"]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 60, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answer = tokenizer.decode(generator.get_sequence(0)[len(prompt) :], skip_special_tokens=True)
    assert answer == generate(open_artifact(built[0]), [QUESTION], max_new_tokens=60, runtime="decoder")[0].text


def test_generate_is_onnxruntime_genai_and_says_what_eager_does(built: tuple[Path, int]) -> None:
    """Eager's tokens are the recorded ones. Without the adapter the question is answered in another way."""
    pytest.importorskip("onnxruntime_genai", reason="extra genai is not installed")
    artifact, recorded, tokenizer = open_artifact(built[0]), load_file(built[0] / GOLDEN), load_tokenizer(built[0])
    prompts, pieces = [tokenizer.decode(recorded[f"prompt.{i}.input_ids"]) for i in range(2)], []
    answers = generate(artifact, prompts, max_new_tokens=16, chat=False, on_text=pieces.append)
    assert [a.runtime for a in answers] == ["genai", "genai"]
    assert [a.text for a in answers] == [tokenizer.decode(recorded[f"prompt.{i}.tokens"], skip_special_tokens=True) for i in range(2)]
    assert len([piece for piece in pieces if piece]) > 8
    (adapted,), (bare,) = (generate(artifact, [QUESTION], max_new_tokens=64, adapter=adapter) for adapter in (True, False))
    assert adapted.runtime == "genai" and bare.runtime.startswith("ONNX Runtime")
    assert adapted.text == "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18" != bare.text
