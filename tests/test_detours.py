"""--no-merge: A and B beside the projections that they change. Structure, numbers of every family, refusals, and wrong ones caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from flora_export.artifact import open_artifact
from flora_export.base_model import load_base
from flora_export.branch import Detour
from flora_export.cli import main
from flora_export.errors import CheckpointError, FusionError
from flora_export.ledger import load_graph
from flora_export.methods import load_checkpoint
from flora_export.passes import passes_for, run_passes
from flora_export.pipeline import BuildOptions, VerifyOptions, build, explain, verify
from flora_export.weights import parts_of
from tests.conftest import silent
from tests.families import make_lora
from tests.mutate import edit, edit_slices

RANK = 3
PACKED = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] out) {
    both = MatMul(x, gate_up)
    gate, up = Split<axis: int = -1, num_outputs: int = 2>(both)
    a = Relu(gate)
    h = Mul(a, up)
    y = MatMul(h, down)
    out = Add(x, y)
}"""
DETOURS = (
    Detour("gate", "LoRA", RANK, 0.5, "gate A", "gate B", "gate_up", 0, 12),
    Detour("up", "LoRA", 2, 2.0, "up A", "up B", "gate_up", 12, 12),
    Detour("down", "LoRA", RANK, 1.0, "down A", "down B", "down", 0, 8),
)
SHAPES = {"gate": (RANK, 8, 12), "up": (2, 8, 12), "down": (RANK, 12, 8)}
_rng = np.random.default_rng(0)
NUMBERS = {
    f"{name} {matrix}": _rng.standard_normal((r, i) if matrix == "A" else (o, r)).astype(np.float32)
    for name, (r, i, o) in SHAPES.items()
    for matrix in "AB"
}
ADAPTER = cast("Any", SimpleNamespace(tensor=NUMBERS.__getitem__, changes=(), bank=None))


def graph(text: str = PACKED) -> ir.Model:
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(1)
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, shape in (("gate_up", (8, 24)), ("down", (12, 8))):
        value = values[name]
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def attached(fuse: str, align: int = 1, text: str = PACKED) -> ir.Model:
    model = graph(text)
    run_passes(model, passes_for(fuse, (), ADAPTER, detours=DETOURS, align=align))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def run(model: ir.Model, x: Any) -> Any:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("fuse", ["none", "forward", "backward", "both"])
def test_it_equals_the_merged_weights(fuse: str, align: int) -> None:
    merged = graph()
    deltas = {d.tensor: d.scale * (NUMBERS[d.b] @ NUMBERS[d.a]).T for d in DETOURS}
    for name, delta in (("gate_up", np.concatenate([deltas["gate"], deltas["up"]], axis=1)), ("down", deltas["down"])):
        value = merged.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() + delta, name=name)
    x = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(run(attached(fuse, align), x), run(merged, x), rtol=1e-5, atol=1e-3)  # fp32, values of hundreds
    assert np.abs(run(merged, x) - run(graph(), x)).max() > 10


def test_a_packed_weight_has_one_gemm_for_all_its_a_and_one_for_all_its_b() -> None:
    def count(model: ir.Model) -> list[int]:
        return [[node.op_type for node in model.graph].count(name) for name in ("MatMul", "Add", "Split")]

    assert count(attached("none")) == [2 + 4, 1 + 2, 1]
    model = attached("both")
    assert count(model) == [2 + 2, 1 + 2, 1 + 2]
    axis, parts = parts_of(model.graph.initializers["gate_up"])
    assert axis == 1 and [(part.tensor, part.size) for part in parts] == [("gate_up", 24), ("gate A", RANK), ("up A", 2)]
    tensor = model.graph.initializers["detour_B.gate_up"].const_value
    assert tensor is not None
    b = tensor.numpy()
    assert b.shape == (RANK + 2, 24)
    assert (b[:RANK, 12:] == 0).all() and (b[RANK:, :12] == 0).all() and (b[:RANK, :12] != 0).all() and (b[RANK:, 12:] != 0).all()


@pytest.mark.parametrize("fuse", ["none", "both"])
def test_a_second_run_changes_nothing(fuse: str) -> None:
    model = attached(fuse)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not any(pass_(model).modified for pass_ in passes_for(fuse, (), ADAPTER, detours=DETOURS))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_a_shared_weight_is_refused() -> None:
    with pytest.raises(FusionError, match=r"down is shared by 2 nodes"):
        attached("both", text=PACKED.replace("out = Add(x, y)", "z = ReduceMean(down)\n    t = Add(x, z)\n    out = Add(t, y)"))


# (family, what the adapter is, tensors of A and B, GEMMs that it adds with all forward fused)
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("llama", {}, 28, 10),  # q, k, v packed: one B
    ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, 8, 2),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "lora_alpha": 64}, 2, 1),
    ("qwen3", {"rank_pattern": {"o_proj": 6}}, 28, 14),  # q, k, v apart
    ("phi3", {}, 16, 8),  # one LoRA on qkv_proj, which the capture cuts and packs again; one on gate_up_proj
    ("gemma", {"target_modules": ["q_proj", "down_proj"]}, 8, 4),
    ("gemma3", {}, 28, 14),
    ("starcoder2", {}, 24, 8),  # biases, and renamed weights
    ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]}, 4, 2),
    ("starcoder2", {"target_modules": ["c_fc", "q_proj"], "lora_bias": True}, 8, 4),  # B's bias goes into the base's
]


@pytest.mark.parametrize(("family", "config", "tensors", "gemms"), CASES, ids=str)
def test_every_family_equals_eager(
    family: str, config: dict[str, Any], tensors: int, gemms: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(family)
    adapter = make_lora(base, tmp_path / "adapter", **config)
    artifact, report = build(adapter, str(base), tmp_path / "out", BuildOptions(merge=False), silent)
    assert report.verified and report.numerics is not None
    assert min(case.largest_effect for case in report.numerics.cases) > 0.005
    assert max(case.effect_error for case in report.numerics.cases) < 1e-4
    before, after = (artifact.manifest.operators[when]["MatMul"] for when in ("before", "after"))
    assert after - before == gemms
    assert sum(entry.origin == "adapter" for entry in artifact.manifest.ledger) == tensors
    assert {(block.fusion, block.reason) for block in artifact.manifest.blocks} == {("forward", "B: it needs A's result")}
    assert len(artifact.manifest.blocks) == tensors // 2
    again = verify(tmp_path / "out", adapter, str(base), VerifyOptions(localise=True), silent)
    assert again.verified and again.blocks and (again.first_divergence or "").startswith("no block is off")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(base, tmp_path_factory.mktemp("detours") / "adapter")


@pytest.fixture(scope="module")
def built(base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detours") / "out"
    build(lora, str(base), out, BuildOptions(merge=False), silent)
    return out


def scale_matrix(matrix: str, factor: float, only: str = "") -> Callable[[Path], None]:
    def change(entry: Any, view: Any) -> None:
        if entry.tensor.endswith(f"lora_{matrix}.weight") and only in entry.tensor:
            view *= factor

    return lambda out: edit(out, change, forge=True)


def swap(one: str, other: str) -> Callable[[Path], None]:
    def change(views: dict[str, Any]) -> None:
        views[one][:], views[other][:] = views[other].copy(), views[one].copy()

    return lambda out: edit_slices(out, change)


def moved(out: Path) -> None:
    """B of k stands in v's columns: they are as wide."""

    def change(views: dict[str, Any]) -> None:
        name = "layers.0.self_attn.k_proj.lora_B.weight"
        views[name][:] = np.roll(views[name], 32, axis=1)

    edit_slices(out, change)


A = "layers.{}.self_attn.{}_proj.lora_A.weight"
WRONG: dict[str, Callable[[Path], None]] = {
    "the adapter lost": scale_matrix("B", 0.0),
    "B 2 % too strong": scale_matrix("B", 1.02),
    "A 2 % too weak": scale_matrix("A", 0.98),
    "A of q and k swapped": swap(A.format(0, "q"), A.format(0, "k")),
    "A of two layers swapped": swap(A.format(0, "v"), A.format(1, "v")),
    "one LoRA lost": scale_matrix("B", 0.0, "layers.1.self_attn.k_proj"),
    "B beside another projection": moved,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_artifact_is_caught(name: str, built: Path, lora: Path, base: Path, tmp_path: Path) -> None:
    """Hashes and ledger are forged to agree: the numbers alone tell, and the ledger still tells from the sources."""
    out = Path(shutil.copytree(built, tmp_path / "out"))
    WRONG[name](out)
    report = verify(out, lora, str(base), VerifyOptions(), silent)
    assert report.numerics is not None
    assert report.numerics.causes, report.to_text()
    assert report.first_divergence is not None and report.first_divergence.startswith("written file, layer")
    assert any("is not what the artifact holds" in fault for fault in report.ledger.faults)


def test_the_adapter_can_be_silenced(built: Path) -> None:
    from flora_export.backends.onnxruntime import Decoder

    artifact = open_artifact(built)
    with_it, without = (Decoder(artifact, adapter=adapter).start([[5, 6, 7]])[0] for adapter in (True, False))
    assert np.abs(with_it - without).max() > 0.1
    assert [node.op_type for node in load_graph(artifact).graph].count("Mul") < 10


def test_the_commands(built: Path, lora: Path, base: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["explain", str(built)])
    assert run.exit_code == 0 and "28 adapter tensors: every one is in its place" in run.output
    assert "model.layers.0.self_attn.k_proj" in run.output and "B: it needs A's result" in run.output
    planned = explain(lora, str(base), "none", silent, merge=False)
    assert [block.reason for block in planned.blocks] == ["--fuse none"] * 14 and not planned.changes
    assert "or beside them with --no-merge" in CliRunner().invoke(main, ["inspect", str(lora), "--base", str(base)]).output
    content = json.loads((built / "manifest.json").read_text())
    assert content["merge"] is False
    arguments = ["build", str(lora), "--base", str(base), "--backend", "hf", "--output", str(tmp_path / "out"), "--no-merge"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and "no place for an A and a B beside a weight. Build with --merge" in refused.output
    short = ["--prompt-tokens", "8", "--past-tokens", "8", "--new-tokens", "2", "--rounds", "1"]
    measured = CliRunner().invoke(main, ["bench", str(built), "--base", str(base), *short, "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["adapter_parameters"] == {"base": 0, "fused": 7424}


@pytest.mark.parametrize("config", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_what_cannot_stay_beside_is_refused(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, tmp_path, **config)
    with pytest.raises(CheckpointError, match=r"only an A and a B beside a linear projection can stay apart.*--merge"):
        load_checkpoint(adapter, load_base(str(base)), merge=False)


def test_a_head_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises((CheckpointError, FusionError), match="--merge"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(merge=False), silent)


OTHERS: list[dict[str, Any]] = [{"precision": "fp16"}, {"target": "cuda", "precision": "bf16", "verify": False}, {"align": 8}]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_targets_and_precisions(options: dict[str, Any], base: Path, lora: Path, tmp_path: Path) -> None:
    _, report = build(lora, str(base), tmp_path / "out", BuildOptions(merge=False, **options), silent)
    assert not report.ledger.faults and report.ledger.adapter_tensors == 28


def test_a_tensorrt_engine_of_it(base: Path, lora: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flora_export.backends.tensorrt.plan import EngineOptions

    options = BuildOptions("tensorrt", precision="fp16", merge=False, settings=EngineOptions("rtx", ("8.9",), cache=False))
    artifact, report = build(lora, str(base), tmp_path / "out", options, silent)
    assert report.verified and {block.reason for block in artifact.manifest.blocks} == {"A: TensorRT itself merges it into its hosts"}
