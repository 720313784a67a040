"""LoRA and DoRA as PEFT writes them, merged: what is read, every family against eager PyTorch, refusals, and what the ledger finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flora_export.artifact import open_artifact
from flora_export.base_model import load_base
from flora_export.cli import main
from flora_export.errors import CheckpointError, FusionError
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, VerifyOptions, build, explain, verify
from flora_export.provenance import read_name
from tests.conftest import silent
from tests.families import FAMILIES, make_lora

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="module")
def built(base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "out"
    build(lora, str(base), out, BuildOptions(), silent)
    return out


@pytest.fixture
def copy(lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora, tmp_path / "adapter"))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_eager(family: str, dora: bool, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Merged, it is the base's own graph; packed, cut and renamed weights included. `build` measures the adapter's own effect."""
    base = bases(family)
    adapter = make_lora(base, tmp_path / "adapter", use_dora=dora, rank_pattern={"o_proj": 6}, alpha_pattern={r"layers.1.*": 3})
    artifact, report = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.numerics is not None
    assert min(case.largest_effect for case in report.numerics.cases) > 0.05
    assert max(case.effect_error for case in report.numerics.cases) < 1e-5
    assert (
        report.ledger.changed_tensors_equal == len(artifact.manifest.changes) == (8 if family == "phi3" else 12 if "star" in family else 14)
    )
    assert {change.what for change in artifact.manifest.changes} == {"DoRA" if dora else "LoRA"}
    assert artifact.manifest.operators["before"] == artifact.manifest.operators["after"]
    assert artifact.manifest.passes[-1] == "ChangeWeights"
    assert report.blocks and all(block.error <= block.allowed for block in report.blocks)


TOKENS = list(range(3, 128, 2))  # many, so that the prompts have some
VARIANTS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}, 4),
    ("llama", {"target_modules": r".*layers\.1\..*(up|gate)_proj"}, 2),
    ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 1),
    ("llama", {"target_modules": ["o_proj"], "layers_to_transform": 0}, 1),
    ("llama", {"exclude_modules": ["down_proj"], "use_rslora": True, "r": 9}, 12),
    ("llama", {"target_modules": ["q_proj", "k_proj", UP], "rank_pattern": {r"0.self_attn.q_proj": 7, "q_proj": 3}}, 5),
    ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, 8),
    ("starcoder2", {"target_modules": ["c_fc", "c_proj"], "lora_bias": True}, 8),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 4),
    ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]}, 5),
    ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "use_dora": True}, 3),
    ("gemma3", {"modules_to_save": ["q_norm"]}, 16),
    ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["mlp"]}, 8),
    ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, 6),
    ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}, 10),
    ("starcoder2", {"target_modules": ["c_fc"], "bias": "all"}, 19),
    ("llama", {"target_modules": ["v_proj"], "trainable_token_indices": TOKENS}, 3),
    ("llama_tied", {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": TOKENS}}, 3),
]


@pytest.mark.parametrize(("family", "config", "count"), VARIANTS, ids=str)
def test_what_a_configuration_promises(
    family: str, config: dict[str, Any], count: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT decided what to save; we promise the same tensors from the configuration, and the truth is PEFT's unmerged model."""
    base = bases(family)
    adapter = make_lora(base, tmp_path / "adapter", **config)
    checkpoint = load_checkpoint(adapter, load_base(str(base)))
    assert set(checkpoint.tensors) == load_file(adapter / "adapter_model.safetensors").keys()
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified and report.ledger.changed_tensors_equal == count


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_weight_is_what_pefts_own_merge_makes(base: Path, tmp_path: Path, dora: bool) -> None:
    """Another implementation, in fp64: equal but for its own rounding."""
    adapter = make_lora(base, tmp_path, use_dora=dora)
    known = load_base(str(base))
    checkpoint = load_checkpoint(adapter, known)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).double(), adapter).double().merge_and_unload()
    merged = model.state_dict()
    for change in checkpoint.changes:
        ours = checkpoint.changed(change, known.read(change.tensor))
        np.testing.assert_allclose(ours, merged[change.tensor].numpy(), rtol=1e-12, atol=1e-14)


OTHERS: list[dict[str, Any]] = [
    {"precision": "fp16"},
    {"target": "cuda", "precision": "bf16", "verify": False},
    {"backend": "hf", "precision": "bf16"},
    {"backend": "hf"},
]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_backends_and_precisions(options: dict[str, Any], base: Path, lora: Path, tmp_path: Path) -> None:
    artifact, report = build(lora, str(base), tmp_path / "out", BuildOptions(**options), silent)
    assert report.ledger.changed_tensors_equal == 14 and not report.ledger.faults
    assert report.verified == options.get("verify", True)
    if options.get("backend") == "hf":
        config, own = (json.loads((path / "config.json").read_text()) for path in (artifact.path, base))
        assert config["intermediate_size"] == own["intermediate_size"]
        AutoModelForCausalLM.from_pretrained(artifact.path)


def test_a_tensorrt_engine_of_it(base: Path, lora: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flora_export.backends.tensorrt.plan import EngineOptions

    settings = EngineOptions("rtx", ("8.9",), cache=False)
    artifact, report = build(lora, str(base), tmp_path / "out", BuildOptions("tensorrt", precision="fp16", settings=settings), silent)
    assert report.verified
    layers = artifact.manifest.engine["layers"]
    assert layers["adapted"] == layers["base"]  # not one kernel more


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "PROMPT"}, r"peft_type is 'PROMPT', which this flora-export does not know. It reads FFBA, LORA"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
    ({"init_lora_weights": "loftq"}, "'loftq', which changes the base"),
    ({"init_lora_weights": "lora_ga"}, "'lora_ga', which changes the base"),
    ({"init_lora_weights": "corda"}, "'corda', which changes the base"),
    ({"init_lora_weights": "magic"}, "init_lora_weights is 'magic', but known are True"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is .* share their weights"),
    ({"alora_invocation_tokens": [1, 2]}, "activated LoRA acts on some tokens"),
    ({"trainable_token_indices": [1, 1]}, "trainable_token_indices is .*must be tokens, each once"),
    ({"trainable_token_indices": [128]}, "has token 128, but model.embed_tokens.weight has 128 rows"),
    ({"trainable_token_indices": {"lm_head": [1]}}, "names 'lm_head', but the base model's embeddings are model.embed_tokens"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "parameters of experts"),
    ({"fan_in_fan_out": True}, "Conv1D"),
    ({"bias": "some"}, "bias is 'some', but must be one of none, all, lora_only"),
    ({"use_quantum_lora": {"a": 1}}, "use_quantum_lora is .*newer PEFT"),
    ({"r": 0}, "r is 0"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern is"),
    ({"alpha_pattern": {"(a+)+b": 1}}, "may repeat no group"),
    ({"layers_pattern": ["("]}, "no regular expression"),
    ({"target_modules": ["nothing"]}, "selects no weight of the base model"),
    ({"target_modules": None}, "target_modules is None"),
    # the file no longer fits what the configuration promises
    ({"r": 5}, r" A is \(4, \d+\), but the base model and its rank need \(5, \d+\)"),
    ({"rank_pattern": {"q_proj": 2}}, r"q_proj A is \(4, 64\), but .* need \(2, 64\)"),
    ({"use_dora": True}, "magnitude is missing"),
    ({"lora_bias": True}, "has no bias to add it to"),
    ({"target_modules": ["q_proj"]}, "tensors that the configuration.*do not promise, first"),
    ({"modules_to_save": ["lm_head"]}, "lm_head.weight, saved whole is missing"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_what_is_refused(changes: dict[str, Any], message: str, copy: Path, base: Path) -> None:
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy, load_base(str(base)))


TENSORS: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda t: t.pop(KEY), f"{Q} A is missing"),
    (lambda t: t.update({f"{KEY[: -len('.lora_A.weight')]}_lora_latent_mapping.weight": torch.eye(4)}), " R is missing"),
    (lambda t: t.update({KEY.replace("lora_A", "lora_E"): torch.zeros(4)}), "1 tensors that the configuration.*lora_E"),
    (lambda t: t[KEY].__setitem__((0, 0), float("nan")), "holds 1 NaN"),
]


@pytest.mark.parametrize(("edit", "message"), TENSORS, ids=lambda value: value if isinstance(value, str) else "")
def test_keys_that_are_not_promised(edit: Callable[..., object], message: str, copy: Path, base: Path) -> None:
    """PEFT reads all of these without a word."""
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy, load_base(str(base)))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str
)
def test_tied_tables_are_refused(config: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama_tied")
    adapter = make_lora(base, tmp_path / "adapter", **config)
    with pytest.raises(CheckpointError, match=r"one table for embeddings and head \(tied\)"):
        load_checkpoint(adapter, load_base(str(base)))


def test_an_overflow_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, tmp_path / "adapter", lora_alpha=10**7)
    with pytest.raises(FusionError, match="changed, overflows float16: build with --precision fp32 or bf16"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(precision="fp16", verify=False), silent)


def test_the_plan_and_the_ledger(built: Path, lora: Path, base: Path) -> None:
    planned = explain(lora, str(base), "both", silent)
    assert len(planned.changes) == 14 and not planned.blocks
    run = CliRunner().invoke(main, ["explain", str(built)])
    assert run.exit_code == 0
    assert f"{Q}.weight" in run.output and "q_proj|k_proj|v_proj[0:64]" in run.output
    content = json.loads(CliRunner().invoke(main, ["explain", str(built), "--json"]).stdout)
    assert [KEY, KEY.replace("lora_A", "lora_B")] in [change["sources"] for change in content["changes"]]
    assert {entry["origin"] for entry in content["changed"]} == {"changed"} and content["tensors"] == []


def test_a_flipped_byte_is_named(built: Path, lora: Path, base: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    entry = next(e for e in open_artifact(out).manifest.ledger if e.tensor == f"{UP}.weight_t")
    tensor = ir.load(out / "model.onnx").graph.initializers[entry.initializer].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[tensor.offset + 4 * 777] ^= 1
    (out / "model.onnx.data").write_bytes(bytes(data))
    for sources in ((None, None), (lora, str(base))):
        report = verify(out, *sources, VerifyOptions(), silent)
        assert any(f"{UP}.weight_t: its bytes are not in" in fault for fault in report.ledger.faults)


def test_the_base_cannot_be_asked_of_a_merged_artifact(built: Path) -> None:
    run = CliRunner().invoke(main, ["generate", str(built), "x", "--without-adapter"])
    assert run.exit_code == 2


def test_golden_vectors_replay(built: Path) -> None:
    assert verify(built, None, None, VerifyOptions(), silent).verified


def test_the_same_bytes_however_many_threads(base: Path, lora: Path, built: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build(lora, str(base), tmp_path / "out", BuildOptions(), silent)
    finally:
        torch.set_num_threads(threads)
    for file in built.iterdir():
        if file.name != "report.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_inspect_reads_no_weight_of_the_base(lora: Path, base: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "base"))
    file = bare / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: 8 + size] + b"\xff" * (file.stat().st_size - 8 - size))  # the header alone is whole
    run = CliRunner().invoke(main, ["inspect", str(lora), "--base", str(bare)])
    assert run.exit_code == 0, run.output
    assert "LORA, 7,424 numbers in 28 tensors (28 F32)" in run.output and "2 weights changed  LoRA, q_proj" in run.output
    content = json.loads(CliRunner().invoke(main, ["inspect", str(lora), "--base", str(bare), "--json"]).stdout)
    assert len(content["changes"]) == 14 and content["branches"] == [] and content["unchecked"] == ""


def test_inspect_without_a_base_and_of_what_is_refused(copy: Path, adapter: Path, base: Path) -> None:
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "owner/elsewhere"}))
    run = CliRunner().invoke(main, ["inspect", str(copy)])
    assert run.exit_code == 0 and "not compared with its base model: owner/elsewhere is no directory here" in run.output
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    assert CliRunner().invoke(main, ["inspect", str(copy)]).exit_code == 2
    run = CliRunner().invoke(main, ["inspect", str(adapter), "--base", str(base)])
    assert run.exit_code == 0 and "2 branches beside blocks  mlp, gated" in run.output


def test_the_benchmark_has_two_arms_of_it(built: Path, base: Path) -> None:
    arguments = [
        "bench",
        str(built),
        "--base",
        str(base),
        "--prompt-tokens",
        "16",
        "--past-tokens",
        "16",
        "--new-tokens",
        "2",
        "--rounds",
        "1",
    ]
    run = CliRunner().invoke(main, [*arguments, "--json"])
    assert run.exit_code == 0, run.output
    content = json.loads(run.stdout)
    assert content["arms"] == ["base", "fused"] and content["artifact"]["rank"] == [4]
    assert content["adapter_parameters"] == {"base": 0, "fused": 7424}
    run = CliRunner().invoke(main, [*arguments, "--arms", "unfused,fused"])
    assert run.exit_code == 2 and "merged into the base's own weights, or beside them" in run.output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.weight", (("a.weight",), False, None, None)),
        ("a.weight_t[3:7]", (("a.weight",), True, 3, 7)),
        ("a.weight__b.weight__axis_0__concat_t[:7]", (("a.weight", "b.weight"), True, None, 7)),
        ("", (("",), False, None, None)),
        (f"a[{'9' * 5000}:]", ((f"a[{'9' * 5000}:]",), False, None, None)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_name_says(name: str, said: tuple[Any, ...]) -> None:
    captured = read_name(name)
    assert (captured.tensors, captured.transposed, captured.start, captured.stop) == said
    assert captured.take(np.zeros(3), 5).size == 0
