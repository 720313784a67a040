"""`--backend hf`: what is written is a plain checkpoint. Plain transformers loads it, and finds base and adapter in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import flora_export.ffba  # noqa: F401  # registers FFBA with PEFT, for the eager side
from flora_export.artifact import open_artifact, seal
from flora_export.cli import main
from flora_export.shards import Planned, read_shards, write_shards
from tests.families import FAMILIES, GATED_FAMILIES, SHAPE, WIDTH, make_adapter, make_base

NEURONS = 96
MIXED = {"target_modules": ["mlp"], "rank_pattern": {r"layers.1.mlp": 6}}  # 4 in layer 0, so that it is padded by 2
TOKENS = torch.tensor([[1, 17, 93, 5, 64, 33, 120, 8, 77, 41, 12, 99]])  # longer than the windows of 8
# Of the largest logit. fp32: eager and SDPA attention sum in another order; 16 bits: one rounding of each weight and activation.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 3e-2}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def build(adapter: Path, base: Path, out: Path, *more: object) -> dict[str, Any]:
    result = run("build", adapter, "--base", base, "--backend", "hf", "--output", out, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


@torch.no_grad()
def plain_logits(path: Path, dtype: torch.dtype | str = "auto") -> torch.Tensor:
    """As a consumer does it: no word of ours."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()(TOKENS).logits[0].float()


@torch.no_grad()
def eager_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, str(adapter)).eval()(TOKENS).logits[0]


def assert_equal_to_eager(out: Path, base: Path, adapter: Path, precision: str = "fp32") -> None:
    expected, got, without = eager_logits(base, adapter), plain_logits(out), plain_logits(base, torch.float32)
    allowed = TOLERANCES[precision] * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= allowed
    assert float((expected - without).abs().max()) > 10 * allowed  # the adapter cannot be missing


@pytest.fixture(scope="module")
def mlp_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "mlp", **MIXED)


@pytest.fixture(scope="module")
def built(base: Path, mlp_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    build(mlp_adapter, base, out)
    return out


@pytest.mark.parametrize("family", GATED_FAMILIES)
def test_plain_transformers_gives_eagers_logits(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases(family), tmp_path / "adapter", **MIXED)
    content = build(adapter, bases(family), tmp_path / "out")
    assert content["verified"] is True
    assert (content["backend"], content["target"], content["padding"]) == ("hf", "any", "left")
    assert content["report"]["ledger"]["base_tensors_derived"] == []  # every base tensor is found bit for bit in the base's own files
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == NEURONS + 6
    assert_equal_to_eager(tmp_path / "out", bases(family), adapter)


def test_no_code_of_ours_is_needed(built: Path, base: Path, mlp_adapter: Path) -> None:
    code = (
        "import json, sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): logits = model(torch.tensor(json.loads(sys.argv[2]))).logits[0]\n"
        "assert not [name for name in sys.modules if name.startswith(('flora_export', 'peft.tuners.ffba'))]\n"
        "print(json.dumps(logits.tolist()))"
    )
    command = [sys.executable, "-c", code, str(built), json.dumps(TOKENS.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    expected = eager_logits(base, mlp_adapter)
    assert torch.allclose(torch.tensor(json.loads(result.stdout)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_matrices_are_neurons_and_zeros_fill_the_rest(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases(family), tmp_path / "adapter", **MIXED, gated_gain=3.0)
    build(adapter, bases(family), tmp_path / "out", "--no-verify")
    file = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    matrices, old = load_file(adapter / "adapter_model.safetensors"), load_file(bases(family) / "model.safetensors")
    for layer, rank in ((0, 4), (1, 6)):
        prefix = f"model.layers.{layer}.mlp."
        g, a, b = (matrices[f"base_model.model.{prefix}ffba_{name}.weight"] for name in "GAB")
        down = file[f"{prefix}down_proj.weight"]
        halves = (
            file[f"{prefix}gate_up_proj.weight"].reshape(2, NEURONS + 6, WIDTH)
            if family == "phi3"
            else [file[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")]
        )
        for half, matrix in zip(halves, (g, a), strict=True):
            assert np.array_equal(half[NEURONS : NEURONS + rank], matrix)
            assert not half[NEURONS + rank :].any()
        assert np.array_equal(down[:, NEURONS : NEURONS + rank], b * np.float32(3.0 * 8.0 / rank))
        assert not down[:, NEURONS + rank :].any()
        assert np.array_equal(down[:, :NEURONS], old[f"{prefix}down_proj.weight"])
    same = [name for name in old if ".mlp." not in name]
    assert all(np.array_equal(file[name], old[name]) for name in same)
    assert file.keys() == old.keys()
    zeros = [entry for entry in open_artifact(tmp_path / "out").manifest.ledger if entry.origin == "zeros"]
    assert {entry.stop - entry.start for entry in zeros} == {2}
    assert len(zeros) == 3  # gate, up and down of layer 0; packed: two halves, and down


def test_layers_without_an_adapter_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama_bias", lambda: tf.LlamaConfig(**SHAPE, mlp_bias=True))
    base = make_base("llama_bias", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["mlp"], layers_to_transform=[1])
    build(adapter, base, tmp_path / "out")
    file = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    for layer in range(2):
        assert file[f"model.layers.{layer}.mlp.up_proj.bias"].shape == (NEURONS + 4,)
        assert not file[f"model.layers.{layer}.mlp.gate_proj.bias"][NEURONS:].any()
    assert not file["model.layers.0.mlp.down_proj.weight"][:, NEURONS:].any()
    assert_equal_to_eager(tmp_path / "out", base, adapter)


def test_tied_embeddings_stay_tied(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases("llama_tied"), tmp_path / "adapter", **MIXED)
    build(adapter, bases("llama_tied"), tmp_path / "out")
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_16_bits(family: str, precision: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    # strong enough to stand out of the rounding
    adapter = make_adapter(bases(family), tmp_path / "adapter", **MIXED, alpha=64.0)
    assert build(adapter, bases(family), tmp_path / "out", "--precision", precision)["verified"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16 if precision == "fp16" else torch.bfloat16}
    assert_equal_to_eager(tmp_path / "out", bases(family), adapter, precision)


def test_a_base_in_bf16(base: Path, tmp_path: Path) -> None:
    """Its tensors are cast to the artifact's precision, or stay as they are."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", **MIXED, alpha=64.0)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        content = build(adapter, tmp_path / "base", tmp_path / precision, "--precision", precision)
        assert content["report"]["ledger"]["base_tensors_derived"] == []
        assert AutoModelForCausalLM.from_pretrained(tmp_path / precision, dtype="auto").dtype == dtype
    assert_equal_to_eager(tmp_path / "fp32", tmp_path / "base", adapter)


def test_shards(base: Path, mlp_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_export.shards.MAX_SHARD_BYTES", 60_000)
    build(mlp_adapter, base, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) >= 5
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(values.nbytes for shard in shards for values in load_file(shard).values())
    assert_equal_to_eager(tmp_path / "out", base, mlp_adapter)
    assert run("explain", tmp_path / "out").exit_code == 0
    shutil.copyfile(shards[0], shards[1])  # now two shards hold the same tensors
    assert "is in both" in run("explain", tmp_path / "out").stderr


def test_golden_vectors_are_not_taken_for_weights(built: Path) -> None:
    """vLLM takes every *.safetensors file of a directory, but for those that an index leaves out."""
    index = json.loads((built / "model.safetensors.index.json").read_text())
    others = {file.name for file in built.glob("*.safetensors")} - set(index["weight_map"].values())
    assert others == {"golden.safetensors"}


def test_explain_and_verify(built: Path, base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    content = json.loads(run("explain", built, "--json").stdout)
    assert content["ok"] is True
    assert {t["tensor"] for t in content["tensors"]} == load_file(mlp_adapter / "adapter_model.safetensors").keys()
    assert "gate_proj + up_proj -> down_proj" in run("explain", built).stdout
    assert run("verify", built).stdout.startswith("VERIFIED")
    assert run("verify", built, "--ckpt", mlp_adapter, "--base", base).exit_code == 0
    other = make_adapter(base, tmp_path / "other", seed=3, **MIXED)
    assert run("verify", built, "--ckpt", other, "--base", base).exit_code == 1
    other_base = make_base("llama", tmp_path / "base", seed=5)
    result = run("verify", built, "--ckpt", mlp_adapter, "--base", other_base)
    assert result.exit_code == 1
    assert "is not the tensor of the base model's own file" in result.stdout


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_one_flipped_byte_is_found(built: Path, tmp_path: Path, place: float) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    file = out / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header))] ^= 4
    file.write_bytes(data)
    result = run("explain", out)
    assert result.exit_code == 1
    assert "SHA-256 differs" in result.stdout
    assert "its bytes are not in" in result.stdout
    assert run("verify", out).exit_code == 1


def edit(out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the written tensors, and forge hashes and ledger to agree."""
    file = out / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    manifest = open_artifact(out).manifest
    entries = []
    for entry in manifest.ledger:
        index = (slice(None),) * entry.axis + (slice(entry.start, entry.stop),)
        digest = hashlib.sha256(np.ascontiguousarray(tensors[entry.initializer][index]).tobytes()).hexdigest()
        entries.append(dataclasses.replace(entry, sha256=digest))
    seal(out, dataclasses.replace(manifest, ledger=entries))


def test_numbers_catch_what_forged_hashes_hide(built: Path, base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))

    def weaken(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][:, NEURONS:] *= 0.9

    edit(out, weaken)
    assert run("explain", out).exit_code == 0
    result = run("verify", out, "--ckpt", mlp_adapter, "--base", base, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert any(cause.startswith("adapter") or "effect" in cause for cause in content["causes"]), content["causes"]
    assert "layer 1: model.layers.1.mlp" in content["first_divergence"]


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "pytorch_model.bin"])
def test_a_file_that_was_not_built_is_a_fault(built: Path, tmp_path: Path, name: str) -> None:
    """transformers would load it first, or on top."""
    out = Path(shutil.copytree(built, tmp_path / "out"))
    (out / name).touch()
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"{name} was not built" in result.stdout


def test_damaged_files(built: Path, base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes | None) -> Path:
        out = Path(shutil.copytree(built, tmp_path / "out", dirs_exist_ok=True))
        if content is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(content)
        return out

    for content in (b"{", b'{"weight_map": {}}', None):
        result = run("explain", damaged("model.safetensors.index.json", content))
        assert result.exit_code == 2
        assert "Build the artifact again" in result.stderr
    damaged("model.safetensors.index.json", (built / "model.safetensors.index.json").read_bytes())
    result = run("explain", damaged("model-00001-of-00001.safetensors", b"12345678"))
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr
    damaged("model-00001-of-00001.safetensors", (built / "model-00001-of-00001.safetensors").read_bytes())
    config = json.loads((built / "config.json").read_text()) | {"num_hidden_layers": 3}
    result = run("generate", damaged("config.json", json.dumps(config).encode()), "hello")
    assert result.exit_code == 2  # no tokenizer
    result = run("verify", tmp_path / "out", "--ckpt", mlp_adapter, "--base", base)
    assert result.exit_code == 1
    assert "missing_keys" in result.stdout


def config_of(base: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


REFUSED: list[tuple[dict[str, Any], tuple[object, ...], str]] = [
    ({}, (), "model.layers.0.self_attn: an attention branch is not r more neurons"),
    ({"target_modules": ["mlp"], "mlp_activation": "silu"}, (), "an MLP branch with activation 'silu'"),
    ({"target_modules": ["mlp"]}, ("--fuse", "backward"), "use --fuse both"),
    ({"target_modules": ["mlp"]}, ("--target", "cuda"), "does not build for cuda"),
]


@pytest.mark.parametrize(("config", "arguments", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refusals(base: Path, tmp_path: Path, config: dict[str, Any], arguments: tuple[object, ...], message: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    result = run("build", adapter, "--base", base, "--backend", "hf", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "--fuse" in message or "cuda" in message or "--backend onnxruntime" in result.stderr  # the remedy
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_refused_bases(base: Path, bases: Callable[[str], Path], mlp_adapter: Path, tmp_path: Path) -> None:
    quantized = config_of(base, tmp_path / "quantized", quantization_config={"quant_method": "fp8"})
    arguments = ("--backend", "hf", "--output", tmp_path / "out")
    result = run("build", mlp_adapter, "--base", quantized, *arguments)
    assert result.exit_code == 2, result.output
    assert "quant_method 'fp8', but read are gptq, compressed-tensors" in result.stderr
    relu = make_adapter(bases("starcoder2_relu"), tmp_path / "relu", target_modules=["mlp"], mlp_activation="relu")
    result = run("build", relu, "--base", bases("starcoder2_relu"), *arguments)
    assert result.exit_code == 2  # neurons as well, but the capture has other names for them than the file
    assert "its files have no model.layers.0.mlp.up_proj.weight" in result.stderr


def test_numbers_beyond_fp16_are_refused(base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    large = config_of(base, tmp_path / "large")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    arguments = ("build", mlp_adapter, "--base", large, "--backend", "hf", "--output", tmp_path / "out", "--no-verify", "--precision")
    result = run(*arguments, "fp16")
    assert result.exit_code == 2
    assert "model.norm.weight of the base model overflows float16" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "bf16").exit_code == 0


def test_reports_and_quiet(base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    """The program as it is run: nothing foreign on stdout or stderr. And every report of what it has built."""
    program, out = (sys.executable, "-m", "flora_export.cli"), tmp_path / "out"
    command = (*program, "build", str(mlp_adapter), "--base", str(base), "--backend", "hf", "--output", str(out), "--json")
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert json.loads(result.stdout)["verified"] is True
    assert all(line.endswith(" ...") for line in result.stderr.splitlines()), result.stderr
    names = {"--report": "page.html", "--markdown": "comment.md", "--junit": "cases.xml"}
    more = [item for option, name in names.items() for item in (option, tmp_path / name)]
    assert run("verify", out, "--ckpt", mlp_adapter, "--base", base, *more).exit_code == 0
    assert all((tmp_path / name).stat().st_size for name in names.values())
    result = run("bench", out, "--base", base)
    assert result.exit_code == 3
    assert "only artifacts of onnxruntime and openvino can be measured" in result.stderr


def test_configuration(base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    """Nothing else changes; code that the base model names does not come along, and the tokenizer does."""
    changed = config_of(base, tmp_path / "base", auto_map={"AutoModelForCausalLM": "modeling.Other"}, torch_dtype="float32")
    (changed / "special_tokens_map.json").write_text("{}")
    build(mlp_adapter, changed, tmp_path / "out", "--no-verify", "--precision", "bf16")
    before, after = (json.loads((path / "config.json").read_text()) for path in (changed, tmp_path / "out"))
    assert before | {"intermediate_size": NEURONS + 6, "dtype": "bfloat16", "torch_dtype": "bfloat16"} == after | {
        "auto_map": before["auto_map"]
    }
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "{}"


def test_builds_are_byte_identical(built: Path, base: Path, mlp_adapter: Path, tmp_path: Path) -> None:
    build(mlp_adapter, base, tmp_path / "out")
    for file in built.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_other_dtypes_in_shards(tmp_path: Path) -> None:
    """Tensors that are no weights keep their dtype; odd sizes and scalars are aligned for every reader."""
    tensors = {
        "odd": np.arange(3, dtype=np.uint8),
        "table": np.arange(5, dtype=np.int64),
        "scalar": np.array(2.5, np.float32),
        "flags": np.array([True, False]),
    }
    write_shards(tmp_path, [Planned(name, values.dtype, values.shape, lambda v=values: v) for name, values in tensors.items()])
    read = load_file(tmp_path / "model-00001-of-00001.safetensors")
    found = read_shards(tmp_path, [file.name for file in tmp_path.iterdir()])
    for name, values in tensors.items():
        assert (read[name].dtype, read[name].tolist()) == (values.dtype, values.tolist())
        assert found[name].numpy().tolist() == values.tolist()
