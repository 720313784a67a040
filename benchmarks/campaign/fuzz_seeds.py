"""Sound files, as small as they can be: what the fuzz targets mutate. Made by hand, so that nothing large is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from flora_export.artifact import DATA, IR, IR_DATA, MODEL, Artifact, seal
from flora_export.bank import Bank
from flora_export.base_model import INDEX
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.ledger import sha256_of
from flora_export.manifest import BlockRecord, ChangeRecord, LedgerEntry, Manifest, Tensor
from flora_export.quantization import Quantization
from flora_export.verify.golden import Recorded, write_golden

WIDTH, VOCABULARY, RANK = 8, 16, 2
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": WIDTH,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
FFBA = {
    "peft_type": "FFBA",
    "r": RANK,
    "alpha": 4.0,
    "ffba_version": 1,
    "target_modules": ["self_attn", "mlp"],
    "rank_pattern": {"mlp": RANK},
}
LORA = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 2},
    "rank_pattern": {}, "layers_to_transform": [0], "layers_pattern": "layers", "bias": "none",
}  # fmt: skip
_LAYER = "model.layers.0"
_PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def whole() -> np.ndarray[Any, Any]:
    """An initializer: two columns of the base, one of an adapter, one of padding."""
    weight = numbers(4, 4)
    weight[:, 3] = 0
    return weight


def base_tensors() -> dict[str, Any]:
    tensors = {f"{_LAYER}.{name}.weight": numbers(WIDTH, WIDTH) for name in _PROJECTIONS}
    tensors |= {f"{_LAYER}.{name}.weight": numbers(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    return tensors | {
        "model.embed_tokens.weight": numbers(VOCABULARY, WIDTH), "model.norm.weight": numbers(WIDTH),
        "lm_head.weight": numbers(VOCABULARY, WIDTH),
    }  # fmt: skip


def ffba_tensors() -> dict[str, Any]:
    prefix, matrices = f"base_model.model.{_LAYER}", [("self_attn", "A"), ("self_attn", "B"), ("mlp", "A"), ("mlp", "B"), ("mlp", "G")]
    return {f"{prefix}.{block}.ffba_{m}.weight": numbers(*((WIDTH, RANK) if m == "B" else (RANK, WIDTH))) for block, m in matrices}


def lora_tensors() -> dict[str, Any]:
    tensors = {}
    for name in ("q_proj", "v_proj"):
        key = f"base_model.model.{_LAYER}.self_attn.{name}"
        tensors |= {f"{key}.lora_A.weight": numbers(RANK, WIDTH), f"{key}.lora_B.weight": numbers(WIDTH, RANK)}
    return tensors


def write_base(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(BASE))
    save_file(base_tensors(), directory / "model.safetensors")
    return directory


def write_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, Any], base: Path | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(config | ({"base_model_name_or_path": str(base)} if base is not None else {})))
    save_file(tensors, directory / WEIGHTS)
    return directory


def manifest(**changes: Any) -> Manifest:
    weight = whole()
    entries = [
        LedgerEntry(f"{_LAYER}.mlp.up_proj.weight_t", "base", "w", 1, 0, 2, 1.0, sha256_of(weight[:, :2])),
        LedgerEntry(f"{_LAYER}.mlp.ffba_A.weight", "adapter", "w", 1, 2, 3, 1.0, sha256_of(weight[:, 2:3])),
        LedgerEntry("zeros", "zeros", "w", 1, 3, 4, 1.0, sha256_of(weight[:, 3:])),
        LedgerEntry(f"{_LAYER}.mlp.down_proj.weight", "changed", "v", 0, 0, 4, 1.0, sha256_of(numbers(4, 4)[0])),
    ]
    facts: dict[str, Any] = {
        "backend": "onnxruntime", "target": "cpu", "precision": "fp32", "fuse": "both", "passes": ["attach"], "padding": "right",
        "verified": True, "versions": {"onnxruntime": "1.31.1"}, "base": {"name": "b", "files": {"config.json": "0"}},
        "checkpoint": {"digest": "0", "files": {}, "config": FFBA, "tensors": [f"{_LAYER}.mlp.ffba_A.weight", "v.lora_A.weight"]},
        "inputs": [Tensor("input_ids", "INT64", ["batch", "tokens"]), Tensor("past_key_values.0.key", "FLOAT", ["batch", 2, "past", 4])],
        "outputs": [Tensor("logits", "FLOAT", ["batch", "tokens", VOCABULARY])],
        "operators": {"before": {"MatMul": 2}, "after": {"MatMul": 1, "Split": 1}},
        "blocks": [BlockRecord(f"{_LAYER}.mlp", "gated", RANK, 2.0, "forward", "B", [f"{_LAYER}.mlp.up_proj.weight_t"], ["w"])],
        "changes": [ChangeRecord(f"{_LAYER}.mlp.down_proj.weight", "LoRA", ["v.lora_A.weight"], RANK, 2.0)],
        "ledger": entries,
    }  # fmt: skip
    return Manifest(**(facts | changes))


def _graph(directory: Path) -> None:
    tensors = {"w": whole(), "v": numbers(4, 4)[0]}
    values = [ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in tensors.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=10), directory / MODEL, external_data=DATA, size_threshold_bytes=0)


def write_artifact(directory: Path, **changes: Any) -> Artifact:
    """An artifact that explains itself without a fault. `changes` are its manifest's."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(BASE))
    slot = 0 if "bank" in changes else None
    _graph(directory)
    write_golden([Recorded(np.arange(3), np.arange(2), numbers(2, VOCABULARY), slot)], directory)
    return seal(directory, manifest(**changes))


def _bank(directory: Path) -> Artifact:
    return write_artifact(directory, bank=Bank("stack", ("one", ""), ("0" * 64, "")))


def _quantized(directory: Path) -> Artifact:
    return write_artifact(directory, precision="int4", quantization=Quantization(4, 32, 0, 0, "fp32"))


def _shards(directory: Path) -> Artifact:
    name = "model-00001-of-00001.safetensors"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(BASE))
    save_file({"w": whole(), "v": numbers(4, 4)[0]}, directory / name, {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"v": name, "w": name}}))
    return seal(directory, manifest(backend="hf", target="any"))


def _ir(directory: Path) -> Artifact:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(BASE))
    (directory / IR).write_text(XML)
    (directory / IR_DATA).write_bytes(whole().tobytes() + numbers(4, 4)[0].tobytes())
    return seal(directory, manifest(backend="openvino", target="cpu"))


# An artifact that is plain, a bank, quantized, a checkpoint, or OpenVINO's.
ARTIFACTS = {"plain": write_artifact, "bank": _bank, "quantized": _quantized, "shards": _shards, "ir": _ir}

XML = """<?xml version="1.0"?>
<net name="m" version="11"><layers>
<layer id="0" name="w" type="Const" version="opset1"><data element_type="f32" shape="4, 4" offset="0" size="64"/></layer>
<layer id="1" name="v" type="Const" version="opset1"><data element_type="f32" shape="4" offset="64" size="16"/></layer>
<layer id="2" name="m" type="MatMul" version="opset1"><data transpose_a="false"/></layer>
<layer id="3" name="r" type="Result" version="opset1"/>
</layers><edges>
<edge from-layer="0" from-port="0" to-layer="2" to-port="0"/><edge from-layer="1" from-port="0" to-layer="2" to-port="1"/>
<edge from-layer="2" from-port="2" to-layer="3" to-port="0"/>
</edges></net>
"""
