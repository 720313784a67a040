"""Engines, really built: TensorRT-RTX needs no GPU for that. The numbers are those of the lowered graph, in ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flora_export.artifact import ENGINE, Artifact
from flora_export.backends.tensorrt import read_gemms
from flora_export.backends.tensorrt.cache import store
from flora_export.backends.tensorrt.plan import EngineOptions, parse_ranges, read_options
from flora_export.backends.tensorrt.stacks import OPEN
from flora_export.bank import COLUMNS, LAYOUTS
from flora_export.errors import FloraExportError
from flora_export.manifest import LedgerEntry
from flora_export.pipeline import BuildOptions, VerifyOptions, build, explain, verify
from flora_export.verify.report import Report
from tests.banks import make_bank
from tests.conftest import silent
from tests.families import FAMILIES, GATED_FAMILIES, make_adapter
from tests.mutate import edit

pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install 'flora-export[tensorrt-rtx]'", exc_type=ImportError)

RANGES = parse_ranges(["prompt=1:16:64 batch=1:1:4 past=1:32:109"])


def build_for(
    base: Path,
    adapter: Path,
    out: Path,
    precision: str,
    cache_tokens: int = 0,
    fuse: str = "both",
    align: int | None = None,
    **options: bool,
) -> tuple[Artifact, Report]:
    engine = EngineOptions("rtx", ("8.9",), RANGES, cache_tokens=cache_tokens, **({"cache": False, "compare_base": False} | options))
    settings = BuildOptions("tensorrt", precision=precision, fuse=fuse, align=align, settings=engine)
    return build(adapter, str(base), out, settings, silent)


@pytest.mark.parametrize(
    ("precision", "cache_tokens"), [("fp32", 0), ("fp16", 0), ("fp16", 110)], ids=["fp32-growing", "fp16-growing", "fp16-static"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_graph_equals_eager_and_builds(
    family: str, precision: str, cache_tokens: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prefill and 16 cached steps within 1e-4 in fp32, within two noise floors in fp16; and an engine from that very graph."""
    base = bases(family)
    mlp = "gated" if family in GATED_FAMILIES else "gelu"
    adapter = make_adapter(base, tmp_path / "adapter", mlp_activation=mlp, rank_pattern={r"layers.1.mlp": 6, r"0.self_attn": 3})
    artifact, report = build_for(base, adapter, tmp_path / "out", precision, cache_tokens)
    assert report.numerics is not None
    for case in report.numerics.cases:
        assert case.floor_logits is not None
        assert case.logits_error <= (1e-4 if precision == "fp32" else 2 * case.floor_logits), case
        assert case.largest_effect > 10 * case.logits_error
    assert (artifact.path / ENGINE).stat().st_size > 100_000
    layers = artifact.manifest.engine["layers"]
    assert layers["adapter_gemms_alone"] == []
    assert report.environment["runtime"].endswith("the engine itself was not run")


@pytest.mark.parametrize("cache_tokens", [0, 110], ids=["growing", "static"])
def test_bf16(cache_tokens: int, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The CPU has no bfloat16, so the graph is run in fp32 with its bf16 weights, and the report says so."""
    _, report = build_for(base, adapter, tmp_path / "out", "bf16", cache_tokens)
    assert "in fp32 with bf16 weights" in report.environment["runtime"]


@pytest.fixture(scope="module")
def compared(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_for(base, adapter, tmp_path_factory.mktemp("compared") / "out", "fp16", compare_base=True)[0]


def test_the_adapter_adds_no_gemm_and_at_most_a_kernel_per_attention(compared: Artifact) -> None:
    """Why fusion is split as it is: forward fusion is left to TensorRT, which merges A into its siblings; B and neurons are ours."""
    layers = compared.manifest.engine["layers"]
    assert layers["adapter_gemms_alone"] == []
    assert layers["adapted"]["gemms"] == layers["base"]["gemms"] == {"prefill": 9, "decode": 9}  # 4 a layer, and the head
    for profile in ("prefill", "decode"):
        attention_blocks = 2  # a Concat each; the MLP's neurons cost none
        assert 0 <= layers["adapted"]["kernels"][profile] - layers["base"]["kernels"][profile] <= attention_blocks
    assert "FuseForward" not in compared.manifest.passes


def test_neurons_alone_add_no_kernel(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["mlp"])
    artifact, _ = build_for(base, adapter, tmp_path / "out", "fp16", compare_base=True)
    layers = artifact.manifest.engine["layers"]
    assert layers["adapted"]["kernels"] == layers["base"]["kernels"]


def test_what_fusion_is_good_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Unfused, B stands alone and kernels are added: the counts above would not hold by themselves."""
    artifact, _ = build_for(base, adapter, tmp_path / "out", "fp16", fuse="none", compare_base=True)
    layers = artifact.manifest.engine["layers"]
    assert layers["adapter_gemms_alone"]
    assert layers["adapted"]["gemms"]["decode"] > layers["base"]["gemms"]["decode"]


def test_explain_lists_the_gemms_with_the_adapters_inside(compared: Artifact) -> None:
    explained = explain(compared.path, None, "both", silent)
    decode = [gemm for gemm in explained.details["gemms"] if gemm["profile"] == "decode"]
    held = sorted(tensor for gemm in decode for tensor in gemm["adapters"])
    assert held == sorted(compared.manifest.checkpoint["tensors"])  # every adapter tensor is in one GEMM
    text = explained.to_text()
    assert "model.layers.*.self_attn: k_proj + q_proj + v_proj" in text
    assert "rank 4 is padded with zeros to 8, a multiple of 8: rank 8 would be free" in text


def test_padding_is_proved_to_be_null(compared: Artifact, base: Path, adapter: Path, tmp_path: Path) -> None:
    zeros = [entry for entry in compared.manifest.ledger if entry.origin == "zeros"]
    assert zeros and {entry.stop - entry.start for entry in zeros} == {4}  # rank 4, padded to 8
    exact, _ = build_for(base, adapter, tmp_path / "out", "fp16", align=1)
    assert not [entry for entry in exact.manifest.ledger if entry.origin == "zeros"]


def test_an_equal_build_takes_the_engine_from_the_cache(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    first, _ = build_for(base, adapter, tmp_path / "one", "fp16", cache=True)
    (entry,) = (tmp_path / "cache").iterdir()
    head = json.loads((entry / "layers.json").read_text())
    monkeypatch.setattr("flora_export.backends.tensorrt.build_engine", None)  # not needed a second time
    second, _ = build_for(base, adapter, tmp_path / "two", "fp16", cache=True)
    assert (first.path / ENGINE).read_bytes() == (second.path / ENGINE).read_bytes()
    monkeypatch.undo()
    monkeypatch.setenv("FLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    (entry / "model.engine").write_bytes(b"truncated")
    third, _ = build_for(base, adapter, tmp_path / "three", "fp16", cache=True)
    assert (third.path / ENGINE).stat().st_size > 100_000
    assert json.loads((entry / "layers.json").read_text())["layers"].startswith(head["layers"][:7])
    store(entry.name, b"", (entry / "layers.json").read_text())  # as a base model to compare with, whose engine nobody runs
    fourth, _ = build_for(base, adapter, tmp_path / "four", "fp16", cache=True)
    assert (fourth.path / ENGINE).stat().st_size > 100_000


def test_int4(base: Path, tmp_path: Path) -> None:
    """Codes stay int4 in the engine, and the adapter adds no GEMM; TensorRT merges no quantized siblings, so A is fused by us."""
    adapter = make_adapter(base, tmp_path / "adapter", alpha=16.0)
    artifact, report = build_for(base, adapter, tmp_path / "out", "int4", compare_base=True)
    assert report.verified and report.numerics is not None and report.price is not None and report.kernels is None
    assert report.numerics.precision == "fp16"
    manifest = artifact.manifest
    assert {record.fusion for record in manifest.blocks} == {"forward+backward", "neurons"} and manifest.align == 32
    layers = manifest.engine["layers"]
    assert layers["adapter_gemms_alone"] == []
    assert layers["adapted"]["gemms"] == layers["base"]["gemms"]
    assert {gemm["layer"] for gemm in read_gemms(artifact) if gemm["adapters"]}
    assert verify(artifact.path, adapter, str(base), VerifyOptions(), silent).verified
    edit(artifact.path, _halve, forge=True)
    wrong = verify(artifact.path, adapter, str(base), VerifyOptions(), silent)
    assert wrong.numerics is not None and any(cause.startswith("wrong adapter") for cause in wrong.numerics.causes), wrong.to_text()


def _halve(entry: LedgerEntry, view: Any) -> None:
    if entry.tensor.endswith("ffba_B.weight") and "scales" in entry.form:
        view *= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "folds int8 weights"),
        ({"head_precision": "int8"}, "--head-precision int8 is not for engines; they take keep"),
        ({"adapter_precision": "int8"}, "--adapter-precision int8 is not for engines; they take same, keep"),
        ({"align": 8}, "--align 8: a quantized engine wants ranks in whole blocks of 32"),
    ],
)
def test_int4_is_refused_what_an_engine_has_no_place_for(
    options: dict[str, Any], words: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    given = {name: value for name, value in options.items() if name.endswith("_precision")}
    engine = replace(read_options(given), flavour="rtx", compute_capabilities=("8.9",), ranges=RANGES)
    settings = BuildOptions("tensorrt", precision=options.get("precision", "int4"), align=options.get("align"), settings=engine)
    with pytest.raises(FloraExportError, match=words):
        build(adapter, str(base), tmp_path / "out", settings, silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bank_builds(layout: str, adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    """Side by side no adapter has a GEMM of its own. Stacked, they are inputs of the engine, and the base's GEMMs are as they were."""
    engine = EngineOptions("rtx", ("8.9",), RANGES, cache=False)
    out = make_bank(adapters, base, tmp_path / "out", layout, backend="tensorrt", precision="fp16", settings=engine)
    layers = out.manifest.engine["layers"]
    assert layers["adapter_gemms_alone"] == []
    assert layers["adapted"]["gemms"] == layers["base"]["gemms"]
    numbers = load_file(adapters["second"] / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.ffba_A.weight"]
    needle = np.ascontiguousarray(numbers[:, 0].astype(np.float16)).tobytes()  # side by side, beside each other in a row of [d, r]
    assert (needle in (out.path / ENGINE).read_bytes()) <= (layout == COLUMNS)
    assert not (out.path / OPEN).exists()
