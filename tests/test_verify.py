"""Verification notices what is wrong, and says which: a byte, a tensor, the base, the adapter. Each fault goes into a copy."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from flora_export.artifact import DATA, GOLDEN, MANIFEST, Artifact, open_artifact, seal
from flora_export.branch import FUSE_LEVELS
from flora_export.errors import ArtifactError, FloraExportError, VerificationError
from flora_export.manifest import LedgerEntry
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.proof import check_ledger
from flora_export.verify.report import Report
from tests.conftest import silent
from tests.families import FAMILIES, SHAPE, make_adapter, make_base
from tests.mutate import edit, scale_b


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    build(adapter, str(base), out, BuildOptions(), silent)
    return out


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


@pytest.fixture
def check(base: Path, adapter: Path) -> Callable[[Path], Report]:
    return lambda out: verify(out, adapter, str(base), VerifyOptions(), silent)


def test_a_good_one(built: Path, check: Callable[[Path], Report]) -> None:
    for report in (check(built), verify(built, None, None, VerifyOptions(), silent)):
        assert report.verified, report.to_text()
        assert report.ledger.adapter_tensors == 2 * 5
        assert "VERIFIED" in report.to_text()
        assert json.loads(report.to_json())["verified"] is True
    numerics = check(built).numerics
    assert numerics is not None
    assert len(numerics.cases) == 4 + 1 + 4 + 1
    assert {case.other_token for case in numerics.cases} == {None}


def test_each_base_tensor_is_found_in_the_base_models_own_file(built: Path, check: Callable[[Path], Report]) -> None:
    ledger = check(built).ledger
    # embedding, final norm and head; per layer two norms, q, k and v packed, o, gate, up, down; derived are the rotary tables
    assert ledger.base_tensors_equal == 3 + 2 * 7
    assert sorted(ledger.base_tensors_derived) == ["model.rotary_emb.cos_cache", "model.rotary_emb.sin_cache"]


@pytest.mark.parametrize("kind", ["adapter", "base"])
def test_one_flipped_byte_names_its_tensor(out: Path, check: Callable[[Path], Report], kind: str) -> None:
    artifact = open_artifact(out)
    entry = next(
        e for e in artifact.manifest.ledger if e.origin == kind and "mlp" in e.tensor and e.initializer.endswith("1.mlp.down_proj.weight_t")
    )
    tensor = ir.load(artifact.model).graph.initializers[entry.initializer].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (out / DATA).open("r+b") as file:  # down_proj is stacked along axis 0, so a slice is a run of bytes
        file.seek((tensor.offset or 0) + entry.start * int(tensor.shape[1]) * 4 + 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    for report in (check_ledger(artifact), verify(out, None, None, VerifyOptions(), silent).ledger, check(out).ledger):
        assert [fault for fault in report.faults if fault.startswith(entry.tensor)] == [
            f"{entry.tensor}: its bytes are not in {entry.initializer}, axis 0, slice [{entry.start}, {entry.stop})"
        ]
        assert f"{DATA} is not the file that was built: its SHA-256 differs from the manifest's" in report.faults


@pytest.mark.parametrize("forge", [False, True])
def test_zeroed_b_is_a_missing_adapter(out: Path, check: Callable[[Path], Report], forge: bool) -> None:
    edit(out, scale_b(0.0), forge=forge)
    report = check(out)
    assert not report.verified
    assert any(cause.startswith("missing adapter: the artifact shows 0.0%") for cause in report.causes)
    assert any(
        re.search(r"ffba_B.weight: (its bytes are not in|the checkpoint's B, times 2, is not what)", cause) for cause in report.causes
    )
    assert not verify(out, None, None, VerifyOptions(), silent).verified  # the golden vectors notice it too, or the ledger


def test_b_scaled_by_five_percent_is_a_wrong_adapter(out: Path, check: Callable[[Path], Report]) -> None:
    edit(out, scale_b(1.05), forge=True)
    report = check(out)
    (cause,) = [cause for cause in report.causes if cause.startswith("wrong adapter")]
    assert re.search(r"effect is off by [3-7]\.\d\d% .* is 1\.0[1-7]\d times as strong", cause)
    assert report.numerics is not None
    assert max(case.base_error for case in report.numerics.cases) < 1e-4


def test_a_damaged_base_is_told_from_a_wrong_adapter(out: Path, check: Callable[[Path], Report]) -> None:
    def change(entry: LedgerEntry, view: Any) -> None:
        if entry.origin == "base" and entry.tensor == "model.layers.1.mlp.up_proj.weight_t":
            view *= 1.05

    edit(out, change, forge=True)
    report = check(out)
    assert report.numerics is not None
    assert [cause.split(":")[0] for cause in report.numerics.causes] == ["wrong base"]
    assert "model.layers.1.mlp.up_proj.weight_t: is not the tensor of the base model's own file" in report.ledger.faults


def test_nan_is_a_failure(out: Path, check: Callable[[Path], Report]) -> None:
    def change(entry: LedgerEntry, view: Any) -> None:
        if entry.tensor.endswith("layers.0.mlp.ffba_A.weight"):
            view[0, 0] = np.nan

    edit(out, change, forge=True)
    assert not check(out).verified


@pytest.mark.parametrize("fuse", FUSE_LEVELS)
def test_a_dropped_adapter(base: Path, adapter: Path, check: Callable[[Path], Report], tmp_path: Path, fuse: str) -> None:
    """The base model's graph and weights, put under the artifact's manifest."""
    out = tmp_path / "out"
    build(adapter, str(base), out, BuildOptions(fuse=fuse, verify=False), silent)
    from flora_export.base_model import load_base
    from flora_export.capture import capture
    from flora_export.ledger import write_model

    bare = tmp_path / "bare"
    bare.mkdir()
    write_model(capture(load_base(str(base)), "cpu", "fp32").model, bare)
    for file in bare.iterdir():
        shutil.copy(file, out)
    seal(out, open_artifact(out).manifest)
    report = check(out)
    assert any(cause.startswith("missing adapter") for cause in report.causes)
    assert any("ffba_B.weight: its" in cause for cause in report.causes)


def test_the_ledger_must_hold_every_tensor_once(built: Path, out: Path) -> None:
    manifest = open_artifact(built).manifest
    (entry,) = [e for e in manifest.ledger if e.tensor.endswith("layers.0.mlp.ffba_B.weight")]
    others = [e for e in manifest.ledger if e is not entry]
    for ledger, fault in (
        (others, f"{entry.tensor}: has 0 slices in the artifact, but must have one"),
        ([*manifest.ledger, entry], f"{entry.tensor}: has 2 slices in the artifact, but must have one"),
        ([*others, dataclasses.replace(entry, start=entry.start - 1)], "does not follow the one before it"),
        (
            [e for e in manifest.ledger if e.initializer != entry.initializer],
            f"initializer {entry.initializer} is in model.onnx, but not in the ledger",
        ),
        ([*manifest.ledger, dataclasses.replace(entry, tensor="stranger")], "stranger: in the ledger, but not in the checkpoint"),
    ):
        faults = check_ledger(Artifact(out, dataclasses.replace(manifest, ledger=ledger))).faults
        assert any(fault in f for f in faults), faults


def test_data_outside_the_artifact_is_not_read(out: Path) -> None:
    model = ir.load(out / "model.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            old = value.const_value
            value.const_value = ir.ExternalTensor("../secret", old.offset, old.length, old.dtype, shape=old.shape, name=old.name)
            break
    ir.save(model, out / "model.onnx")
    with pytest.raises(ArtifactError, match="Only files of the artifact itself are read"):
        check_ledger(open_artifact(out))


@pytest.mark.parametrize("with_sources", [False, True])
@pytest.mark.parametrize("damage", ["missing data", "short data", "no model", "broken model"])
def test_broken_files(out: Path, check: Callable[[Path], Report], damage: str, with_sources: bool) -> None:
    if damage == "missing data":
        (out / DATA).unlink()
    elif damage == "short data":
        (out / DATA).write_bytes((out / DATA).read_bytes()[:-4])
    elif damage == "no model":
        (out / "model.onnx").unlink()
    else:
        (out / "model.onnx").write_bytes(b"\xff" * 100)
    if damage != "short data":
        with pytest.raises(ArtifactError, match=r"model\.onnx(\.data)? (cannot be read|is missing)"):
            check(out)
        return
    report = check(out) if with_sources else verify(out, None, None, VerifyOptions(), silent)
    assert not report.verified
    assert any(DATA in fault for fault in report.ledger.faults)
    assert any("cannot be read" in fault for fault in report.ledger.faults)


def test_a_lost_window_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than every prompt: the run near the context's end sees it."""
    import transformers as tf

    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    monkeypatch.setitem(FAMILIES, "window", lambda: tf.Qwen2Config(**SHAPE, **window))
    monkeypatch.setattr("flora_export.capture._mend_attention", lambda *_: None)
    base = make_base("window", tmp_path / "base")
    with pytest.raises(VerificationError, match=r"wrong base: .* in near the context's end"):
        build(make_adapter(base, tmp_path / "adapter"), str(base), tmp_path / "out", BuildOptions(), silent)


def test_another_checkpoint_or_base(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(base, tmp_path / "other", seed=5)
    causes = verify(built, other, str(base), VerifyOptions(), silent).causes
    assert any("is not the checkpoint that the artifact was built from" in cause for cause in causes)
    assert any(cause.startswith("wrong adapter") for cause in causes)
    causes = verify(built, adapter, str(make_base("llama", tmp_path / "base", seed=9)), VerifyOptions(), silent).causes
    assert any("is not the base model that the artifact was built from" in cause for cause in causes)
    assert any(cause.startswith("wrong base") for cause in causes)


def test_an_untrained_adapter_is_vacuous(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", init_ffba_weights=True)
    with pytest.raises(VerificationError, match=r"vacuous: the adapter's own effect on the logits \(0\)"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert not (tmp_path / "out").exists()
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(allow_vacuous=True), silent)
    assert report.verified


def test_golden_vectors(out: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(out / GOLDEN)
    assert {name: (str(t.dtype), t.ndim) for name, t in tensors.items() if name.startswith("prompt.0")} == {
        "prompt.0.input_ids": ("int64", 1), "prompt.0.tokens": ("int64", 1), "prompt.0.logits": ("float32", 2)
    }  # fmt: skip
    assert len(tensors["prompt.0.tokens"]) == len(tensors["prompt.0.logits"]) == 16
    tensors["prompt.1.logits"][3, 4] += 0.01
    save_file(tensors, out / GOLDEN)
    seal(out, open_artifact(out).manifest)
    assert [cause.split(":")[0] for cause in verify(out, None, None, VerifyOptions(), silent).causes] == ["golden prompt 1"]
    narrow, unknown = tensors["prompt.0.logits"][:, :5].copy(), tensors["prompt.0.tokens"] + 500
    for change in ({"prompt.0.logits": narrow}, {"prompt.0.tokens": unknown}, None):
        save_file({} if change is None else tensors | change, out / GOLDEN)
        seal(out, open_artifact(out).manifest)
        with pytest.raises(ArtifactError, match="is damaged: it must hold prompts"):
            verify(out, None, None, VerifyOptions(), silent)
    (out / GOLDEN).write_bytes(b"x")
    seal(out, open_artifact(out).manifest)
    with pytest.raises(ArtifactError, match="is damaged"):
        verify(out, None, None, VerifyOptions(), silent)


def test_without_golden_vectors(base: Path, adapter: Path, tmp_path: Path) -> None:
    artifact, report = build(adapter, str(base), tmp_path / "out", BuildOptions(verify=False), silent)
    assert (report.verified, report.causes) == (False, [])
    assert report.to_text().startswith("NOT VERIFIED: the ledger alone was checked")
    assert not artifact.manifest.verified
    with pytest.raises(ArtifactError, match=r"was built with --no-verify\. Verify it with --ckpt"):
        verify(tmp_path / "out", None, None, VerifyOptions(), silent)
    assert verify(tmp_path / "out", adapter, str(base), VerifyOptions(), silent).verified


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp16"), ("cuda", "fp32")])
def test_other_precisions_and_targets(base: Path, adapter: Path, tmp_path: Path, target: str, precision: str) -> None:
    """fp16 runs on the CPU provider; a graph for CUDA is built here and verified where CUDA is."""
    options = BuildOptions(target=target, precision=precision, verify=target == "cpu")
    artifact, report = build(adapter, str(base), tmp_path / "out", options, silent)
    assert artifact.manifest.padding == "left"  # the standard Attention operator
    assert check_ledger(artifact).faults == []
    if target == "cpu":
        assert report.verified
        edit(tmp_path / "out", scale_b(1.05), forge=True)
        assert any(c.startswith("wrong adapter") for c in verify(tmp_path / "out", adapter, str(base), VerifyOptions(), silent).causes)
    else:
        with pytest.raises(FloraExportError, match=r"has no|is for cuda, but this ONNX Runtime has"):
            verify(tmp_path / "out", adapter, str(base), VerifyOptions(), silent)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_graphs_of_half_precision_are_built(base: Path, adapter: Path, tmp_path: Path, precision: str) -> None:
    artifact, _ = build(adapter, str(base), tmp_path / "out", BuildOptions(target="cuda", precision=precision, verify=False), silent)
    assert artifact.manifest.padding == "right"
    assert artifact.manifest.operators["after"]["GroupQueryAttention"] == 2
    assert check_ledger(artifact).faults == []
    assert (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_localise_names_the_layer_of_one_wrong_slice(out: Path, check: Callable[[Path], Report], layer: int, matrix: str) -> None:
    def change(entry: LedgerEntry, view: Any) -> None:
        if entry.tensor.endswith(f"layers.{layer}.mlp.ffba_{matrix}.weight"):
            view += 0.05

    edit(out, change, forge=True)
    where = check(out).first_divergence
    assert where is not None
    assert where.startswith(f"written file, layer {layer}: model.layers.{layer}.mlp (")


def test_localise_finds_nothing_in_a_right_artifact(built: Path, base: Path, adapter: Path) -> None:
    report = verify(built, adapter, str(base), VerifyOptions(localise=True), silent)
    assert report.verified
    assert report.first_divergence is not None
    assert report.first_divergence.startswith("no block is off in any stage")


def test_localise_names_a_pass(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that puts the columns of one layer in the wrong order."""
    from flora_export.passes import fuse_backward

    real = fuse_backward._fuse_one

    def wrong(model: ir.Model, branch: Any) -> None:
        real(model, branch)
        if "layers.1" in branch.block:
            concat = next(node for node in model.graph if node.name == f"{branch.block}.ffba_concat")
            first, second = concat.inputs
            concat.replace_input_with(0, second)
            concat.replace_input_with(1, first)

    monkeypatch.setattr(fuse_backward, "_fuse_one", wrong)
    with pytest.raises(VerificationError, match=r"first divergence: graph after FuseBackward, layer 1: model\.layers\.1\.self_attn"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)


def test_replay_needs_no_torch(built: Path) -> None:
    """The machine that serves has neither the checkpoint nor torch."""
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'peft', 'mobius', 'matplotlib'): sys.modules[name] = None\n"
        f"from flora_export.cli import main\nmain(['verify', {str(built)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout.splitlines()[0]) == (0, "VERIFIED"), result.stderr
