"""Twenty-two wrong artifacts, hashes and ledger forged to agree: the numbers alone catch every one. Eleven right ones all pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from flora_export.errors import BackendError
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from tests.conftest import silent
from tests.families import make_adapter
from tests.mutate import edit, edit_graph, edit_manifest, edit_slices, scale_b

Wrong = tuple[str, dict[str, Any], Callable[[Path], None]]  # family, adapter, what is done to a right artifact
A, B, G = (f"layers.{{}}.{{}}.ffba_{m}.weight" for m in "ABG")


def swap(one: str, other: str) -> Callable[[Path], None]:
    def change(views: dict[str, Any]) -> None:
        views[one][:], views[other][:] = views[other].copy(), views[one].copy()

    return lambda out: edit_slices(out, change)


def write(name: str, function: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(views: dict[str, Any]) -> None:
        views[name][:] = function(views[name].copy())

    return lambda out: edit_slices(out, change)


def scale_matrix(matrix: str, factor: float) -> Callable[[Path], None]:
    def change(entry: Any, view: Any) -> None:
        if entry.tensor.endswith(f"ffba_{matrix}.weight"):
            view *= factor

    return lambda out: edit(out, change, forge=True)


def replace_operator(old: str, new: str) -> Callable[[Path], None]:
    def change(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.op_type == old and "ffba" in (node.name or ""))
        node.op_type = new

    return lambda out: edit_graph(out, change)


def keys_off_by_one(out: Path) -> None:
    """GroupQueryAttention writes each new key one place too early: its lengths are the mask's sum minus 2."""

    def change(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.op_type == "Constant" and "value_int" in node.attributes)
        node.attributes["value_int"] = ir.AttrInt64("value_int", 2)

    edit_graph(out, change)


def lost_bias(out: Path) -> None:
    def change(views: dict[str, Any]) -> None:
        for name, view in views.items():
            if "q_proj.bias" in name:
                view[:] = 0

    edit_slices(out, change)


FULL = {"r": 64, "alpha": 8.0}
WRONG: dict[str, Wrong] = {
    "B zeroed": ("llama", {}, lambda out: edit(out, scale_b(0.0), forge=True)),
    "B 2 % too strong": ("llama", {}, lambda out: edit(out, scale_b(1.02), forge=True)),
    "B 2 % too weak": ("llama", {}, lambda out: edit(out, scale_b(0.98), forge=True)),
    "B negated": ("llama", {}, lambda out: edit(out, scale_b(-1.0), forge=True)),
    "alpha / r instead of alpha / sqrt r": ("llama", {"use_rslora": True}, lambda out: edit(out, scale_b(0.5), forge=True)),
    "B rounded to half precision": ("llama", {}, write(B.format(0, "mlp"), lambda v: v.astype(np.float16))),
    "A 2 % too strong": ("llama", {}, scale_matrix("A", 1.02)),
    "G 2 % too strong": ("llama", {}, scale_matrix("G", 1.02)),
    "layers swapped": ("llama", {}, swap(B.format(0, "mlp"), B.format(1, "mlp"))),
    "A of the layers swapped": ("llama", {}, swap(A.format(0, "self_attn"), A.format(1, "self_attn"))),
    "attention's B in the MLP": ("llama", {}, swap(B.format(0, "self_attn"), B.format(0, "mlp"))),
    "A and G swapped": ("llama", {}, swap(A.format(1, "mlp"), G.format(1, "mlp"))),
    "A transposed, r = d": ("llama", FULL, write(A.format(0, "self_attn"), np.transpose)),
    "B transposed, r = d": ("llama", FULL, write(B.format(1, "mlp"), np.transpose)),
    "one rank lost": ("llama", {}, write(B.format(1, "self_attn"), lambda v: np.concatenate([v[:-1], 0 * v[-1:]]))),
    "one number lost": ("llama", {}, write(A.format(1, "self_attn"), lambda v: v * (np.arange(v.size).reshape(v.shape) != 7))),
    "wrong activation": ("llama", {"attn_activation": "relu"}, replace_operator("Relu", "Sigmoid")),
    "bias lost": ("qwen2", {}, lost_bias),
    "keys off by one": ("llama", {}, keys_off_by_one),
    "padding on the wrong side": ("llama", {}, lambda out: edit_manifest(out, padding="left")),
    "rotary table off by one": ("llama", {}, write("rotary_emb.cos_cache", lambda v: np.roll(v, 1, axis=0))),
    "a weight of the base 0.1 % off": ("llama", {}, write("layers.1.self_attn.o_proj.weight_t", lambda v: v * 1.001)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_artifact_is_caught(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, config, break_it = WRONG[name]
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    build(adapter, str(base), tmp_path / "right", BuildOptions(verify=False), silent)
    out = Path(shutil.copytree(tmp_path / "right", tmp_path / "out"))
    break_it(out)
    if name == "keys off by one":
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on input_ids .*: .* out of range"):
            verify(out, adapter, str(base), VerifyOptions(), silent)
        return
    report = verify(out, adapter, str(base), VerifyOptions(), silent)
    assert report.numerics is not None
    assert report.numerics.causes, report.to_text()


RIGHT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "as it is": ("llama", {}, {}),
    "not fused": ("llama", {}, {"fuse": "none"}),
    "weak": ("llama", {"alpha": 0.1}, {}),
    "strong": ("llama", {"alpha": 64.0}, {}),
    "rank 1": ("llama", {"r": 1}, {}),
    "rank d": ("llama", FULL, {}),
    "one layer": ("llama", {"layers_to_transform": [1]}, {}),
    "MLP alone": ("gemma2", {"target_modules": ["mlp"]}, {}),
    "half precision": ("llama", {}, {"precision": "fp16"}),
    "half precision, norms on q and k": ("qwen3", {"alpha": 32.0}, {"precision": "fp16"}),
    "packed projections": ("phi3", {"use_rslora": True, "attn_activation": "gelu"}, {}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_artifact_passes(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, config, options = RIGHT[name]
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(**options), silent)
    assert report.verified
    assert report.numerics is not None
    # the multiple of 10 in TOLERANCES leaves room above what right artifacts show
    seen = [case.logits_error / case.floor_logits for case in report.numerics.cases if case.floor_logits]
    assert max(seen) < 6
