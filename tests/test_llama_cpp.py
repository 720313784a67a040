"""llama.cpp on what `--backend hf` writes: its own converter reads the directory, and its runtime gives eager PyTorch's tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import flora_export.ffba  # noqa: F401  # registers FFBA with PEFT, for the eager side
from flora_export.cli import main
from tests.conftest import MLP_ADAPTER

pytestmark = pytest.mark.real
CONVERTER = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
QUESTION = "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?"
TOKENS = 24
ALLOWED = 0.05  # nats: llama.cpp keeps keys and values in fp16
RUN = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = sys.argv[1], 256, 2, False
request = {"prompt": json.loads(sys.argv[2]), "max_tokens": int(sys.argv[3]), "temperature": 0.0, "logprobs": 3, "ignore_eos": True}
answer = xllamacpp.Server(params).handle_completions(request)
json.dump(answer["choices"][0]["logprobs"]["content"], open(sys.argv[4], "w"))
"""


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed MLP adapter as a checkpoint, and that as llama.cpp's own converter leaves it."""
    if not CONVERTER.is_file():
        pytest.skip(f"no {CONVERTER}: `make test` takes it from the sources of llama-cpp-python")
    root = tmp_path_factory.mktemp("llama_cpp")
    arguments = ["build", MLP_ADAPTER, "--base", smollm2, "--backend", "hf", "--output", root / "out", "--no-verify"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    command = [sys.executable, str(CONVERTER), str(root / "out"), "--outfile", str(root / "model.gguf"), "--outtype", "f32"]
    environment = os.environ | {"PYTHONPATH": str(CONVERTER.parent / "gguf-py")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return root / "model.gguf"


def test_the_artifact_answers(converted: Path) -> None:
    """In plain transformers: text in, text out."""
    result = CliRunner().invoke(main, ["generate", str(converted.parent / "out"), QUESTION])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip().endswith("18")


def test_the_converted_model_is_wider(converted: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(converted)
    assert reader.fields["llama.feed_forward_length"].contents() == 1536 + 12
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight"] == (1536 + 12, 576)
    assert shapes["blk.29.ffn_gate.weight"] == (576, 1536 + 12)


@torch.no_grad()
def test_llama_cpp_decodes_as_eager(converted: Path, smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp carries llama.cpp's runtime: pip install 'flora-export[dev]'")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    command = [sys.executable, "-c", RUN, str(converted), json.dumps(prompt), str(TOKENS), str(tmp_path / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    tokens = [step["id"] for step in answer]
    assert len(tokens) == TOKENS

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, str(MLP_ADAPTER)).eval()
    ids = torch.tensor([prompt + tokens])
    eager = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
    with model.disable_adapter():
        without = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
    assert eager.argmax(-1).tolist() == tokens
    effect = 0.0
    for step, found in enumerate(answer):
        for candidate in found["top_logprobs"]:
            assert abs(float(eager[step, candidate["id"]]) - candidate["logprob"]) <= ALLOWED, (step, candidate)
            effect = max(effect, abs(float(eager[step, candidate["id"]] - without[step, candidate["id"]])))
    assert effect > 10 * ALLOWED  # the adapter cannot be missing
