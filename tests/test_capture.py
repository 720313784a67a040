"""Capture: quiet, lazy, for each target and precision; and what it cannot capture is refused, never exported wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import transformers as tf

from flora_export.base_model import load_base
from flora_export.capture import PRECISIONS, capture
from flora_export.errors import BackendError, CheckpointError, VerificationError
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import FAMILIES, SHAPE, make_adapter, make_base

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@pytest.mark.parametrize(("target", "precision"), [(t, p) for t, precisions in PRECISIONS.items() for p in precisions])
def test_targets_and_precisions(base: Path, target: str, precision: str, capfd: pytest.CaptureFixture[str]) -> None:
    graph = capture(load_base(str(base)), target, precision).model.graph
    assert graph.initializers["model.layers.0.mlp.up_proj.weight_t"].dtype == DTYPES[precision]
    assert graph.outputs[0].name == "logits"
    assert capfd.readouterr() == ("", "")


def test_weights_stay_lazy(base: Path) -> None:
    graph = capture(load_base(str(base)), "cpu", "fp32").model.graph
    matrices = [v.const_value for v in graph.initializers.values() if "proj" in (v.name or "")]
    assert matrices
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in matrices)


def test_a_precision_that_does_not_run_is_refused(base: Path) -> None:
    with pytest.raises(BackendError, match=r"bf16 does not run on target cpu in ONNX Runtime; it has fp32, fp16"):
        capture(load_base(str(base)), "cpu", "bf16")


def test_an_unknown_model_is_refused(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "no_such_thing", "architectures": ["NoSuchThing"]}))
    with pytest.raises(CheckpointError, match="mobius cannot capture a 'no_such_thing' model"):
        capture(load_base(str(copy)), "cpu", "fp32")


def test_a_window_that_the_graph_cannot_express_is_refused(bases: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"layer 0 attends to a window of 8 tokens, which Attention cannot express\. Windows need"):
        capture(load_base(str(bases("gemma3"))), "cpu", "fp16")


def test_gemma3_layers_have_their_own_rotary_tables_and_windows(bases: Callable[[str], Path]) -> None:
    graph = capture(load_base(str(bases("gemma3"))), "cpu", "fp32").model.graph
    local, full = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert [v.name for v in local.inputs[-2:] if v] == ["model.rotary_emb_local.cos_cache", "model.rotary_emb_local.sin_cache"]
    assert [v.name for v in full.inputs[-2:] if v] == ["model.rotary_emb.cos_cache", "model.rotary_emb.sin_cache"]
    assert local.attributes["local_window_size"].value == 8
    assert "local_window_size" not in full.attributes


def test_a_family_that_is_captured_wrong_is_never_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mobius 0.1.0 captures Cohere wrong; verification says that the base, not the adapter, is at fault."""
    monkeypatch.setitem(FAMILIES, "cohere", lambda: tf.CohereConfig(**SHAPE))
    base = make_base("cohere", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(VerificationError, match="wrong base: without the adapter, logits are off"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(FAMILIES, "moe", lambda: tf.Qwen2MoeConfig(**SHAPE, **experts))
    base = make_base("moe", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", mlp_activation="identity")
    from flora_export.errors import FusionError

    with pytest.raises(FusionError, match=r"layers\.0\.mlp: expected first projections .* Blocks with experts"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight"])
def test_a_half_downloaded_base_is_refused(base: Path, tmp_path: Path, missing: str) -> None:
    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(copy / "model.safetensors")
    del tensors[missing]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="of its weights are missing, first"):
        capture(load_base(str(copy)), "cpu", "fp32")
