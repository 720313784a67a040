"""Quantized artifacts: verified, base and adapter apart in their blocks, the ledger derived anew, and wrong ones caught."""

from __future__ import annotations

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from flora_export.artifact import open_artifact
from flora_export.backends import load_backend
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.quantizing import QuantizationOptions
from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.cli import main
from flora_export.errors import FloraExportError, VerificationError
from flora_export.passes import run_passes
from flora_export.passes.quantize import Quantize
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.quantization import BLOCK_SIZES
from flora_export.quantization.packing import Form, dequantize, quantize, read_form
from flora_export.verify.formats import junit, markdown
from flora_export.verify.html import verify_page
from flora_export.weights import parts_of
from tests.conftest import silent
from tests.families import GATED_FAMILIES, make_adapter, make_lora
from tests.mutate import edit, edit_graph, edit_slices


def options(
    precision: str = "int4", fuse: str = "both", *, allow_vacuous: bool = False, check: bool = True, **settings: Any
) -> BuildOptions:
    return BuildOptions(precision=precision, fuse=fuse, verify=check, allow_vacuous=allow_vacuous, settings=QuantizationOptions(**settings))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [8, 72, 96])
def test_what_is_quantized_is_read_back_to_half_a_step(bits: int, rows: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 40), np.float32)
    codes, scales = quantize(weight, bits, 32)
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :rows].T
    off = np.abs(dequantize(codes, scales, bits, rows) - weight) / steps
    assert off.max() <= 1.0 + 1e-5  # the number opposite to a block's largest has one step less
    assert np.median(off) < 0.3


def test_a_form_is_read_as_it_is_written() -> None:
    for form in (Form(4, 32, "codes"), Form(8, 128, "scales", "row"), Form(4, 64, "codes", "standard")):
        assert read_form(str(form)) == form
    for wrong in ("", "int4", "int5 row codes, 32", "int4 row codes, 33"):
        with pytest.raises(ValueError, match="no form"):
            read_form(wrong)


@pytest.mark.parametrize(
    ("family", "precision", "fuse", "block"),
    [
        ("llama", "int4", "both", 32),
        ("llama", "int8", "none", 32),
        ("llama_tied", "int4", "forward", 16),
        ("llama_tied", "int8", "backward", 64),
        ("gemma2", "int4", "both", 16),  # soft caps after the head, and a width of 80
        ("phi3", "int4", "both", 16),
        ("qwen2", "int8", "both", 32),
        ("starcoder2", "int4", "both", 32),
        ("qwen3", "int4", "both", 64),  # 96 neurons: B's rows wait for a block of their own
    ],
)
def test_a_quantized_artifact_is_verified(
    family: str, precision: str, fuse: str, block: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {} if family in GATED_FAMILIES else {"mlp_activation": "identity"}
    adapter = make_adapter(bases(family), tmp_path / "adapter", alpha=16.0, **own)
    artifact, report = build(
        adapter, str(bases(family)), tmp_path / "out", options(precision, fuse, block_size=block, adapter_precision=None), silent
    )
    assert report.verified and report.numerics is not None and report.kernels is not None and report.price is not None
    assert artifact.manifest.operators["after"]["MatMulNBits"] >= artifact.manifest.operators["before"]["MatMul"]
    assert report.price.effect_error > 0
    assert max(case.effect_error for case in report.numerics.cases) < 0.01
    again = verify(tmp_path / "out", None, None, VerifyOptions(), silent)
    assert again.verified, again.to_text()


@pytest.mark.parametrize("precision", ["int8", "keep"])
def test_an_adapter_of_another_precision_stands_beside_its_hosts(precision: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    artifact, report = build(adapter, str(base), tmp_path / "out", options(adapter_precision=precision), silent)
    assert report.verified and report.price is not None
    assert {record.fusion for record in artifact.manifest.blocks} == {"none"}
    assert {record.reason for record in artifact.manifest.blocks} == {"--adapter-precision: other bits than its hosts'"}
    forms = {entry.form for entry in artifact.manifest.ledger if entry.origin == "adapter"}
    assert forms == ({"int8 blocks codes, 32", "int8 blocks scales, 32"} if precision == "int8" else {""})
    assert (report.price.adapter_loss is None) == (precision == "keep")
    assert report.price.adapter_loss is None or report.price.adapter_loss < 0.02


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_base_stays_the_base_bit_for_bit(precision: str, block: int, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    artifact, _ = build(
        adapter, str(base), tmp_path / "out", options(precision, check=False, block_size=block, head_precision="keep"), silent
    )
    assert artifact.manifest.quantization is not None
    alone = capture(load_base(str(base)), "cpu", "fp32").model
    run_passes(alone, [Quantize(artifact.manifest.quantization)])
    parts = {
        (part.tensor, part.form.split(",")[0]): part.read() for value in alone.graph.initializers.values() for part in parts_of(value)[1]
    }
    initializers = ir.load(artifact.model).graph.initializers
    compared = 0
    for entry in artifact.manifest.ledger:
        tensor = initializers[entry.initializer].const_value
        assert tensor is not None
        values = tensor.numpy() if tensor.shape.rank() else tensor.numpy().reshape(1)
        written = values[(slice(None),) * entry.axis + (slice(entry.start, entry.stop),)]
        if entry.origin == "base" and entry.form:
            whole = parts[_uncut(entry.tensor), entry.form.split(",")[0]]
            start = _start_of(entry.tensor)
            assert np.array_equal(written, whole[start : start + len(written)] if entry.axis == 0 else whole), entry.tensor
            compared += 1
    assert compared >= 2 * 4 * 2


def _uncut(name: str) -> str:
    return name.partition("[")[0]


def _start_of(name: str) -> int:
    return int(name.partition("[")[2].partition(":")[0] or 0)


def test_a_merged_lora_is_quantized_after_it_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, tmp_path / "lora")
    artifact, report = build(adapter, str(base), tmp_path / "out", options("int8"), silent)
    assert report.verified and report.price is not None and report.price.adapter_loss is None
    assert report.ledger.changed_tensors_equal == len(artifact.manifest.changes)
    edit(
        tmp_path / "out",
        lambda entry, view: _flip(view) if entry.origin == "changed" and "codes" in entry.form else None,
        forge=True,
    )
    report = verify(tmp_path / "out", adapter, str(base), VerifyOptions(), silent)
    assert any("changed by" in fault for fault in report.ledger.faults)
    assert report.numerics is not None and report.numerics.causes


def test_what_peft_merges_is_not_quantized(base: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(FloraExportError, match=r"IA3, merged by PEFT .*, has other last bits on other machines, and int4 codes"):
        build(tmp_path / "ia3", str(base), tmp_path / "out", options(), silent)


def test_the_adapter_can_be_silenced(base: Path, adapter: Path, tmp_path: Path) -> None:
    artifact, _ = build(adapter, str(base), tmp_path / "out", options(check=False), silent)
    with_it, without = (Decoder(artifact, adapter=on, exact=True).start([[5, 6, 7]])[0] for on in (True, False))
    (tmp_path / "base").mkdir()
    alone = load_backend("onnxruntime").decode_base(artifact, load_base(str(base)), tmp_path / "base", exact=True).start([[5, 6, 7]])[0]
    assert np.abs(with_it - alone).max() > 0.1
    assert np.abs(without - alone).max() < 1e-4


def _flip(view: Any) -> None:
    view.reshape(-1)[0] ^= 0x11 if view.dtype == np.uint8 else 0


def swap_nibbles(view: Any) -> None:
    view[:] = (view >> 4) | (view << 4)


def shift_block(view: Any) -> None:
    view[:] = np.roll(view, 1, axis=1)


def change(ending: str, content: str, function: Callable[[Any], None]) -> Callable[[Path], None]:
    def each(entry: Any, view: Any) -> None:
        if entry.tensor.endswith(ending) and f" {content}," in entry.form:
            function(view)

    return lambda out: edit(out, each, forge=True)


def scaled(view: Any) -> None:
    view *= 1.02


def one_scale(view: Any) -> None:
    view.reshape(-1)[3] *= 2


def zero_point(out: Path) -> None:
    """A zero point of 7 where the format's own is 8."""

    def each(graph: ir.Graph) -> None:
        node = next(n for n in graph if n.op_type == "MatMulNBits" and "down_proj" in (n.inputs[1].name if n.inputs[1] is not None else ""))
        columns, blocks = node.attributes["N"].as_int(), -(-node.attributes["K"].as_int() // 32)
        points = ir.tensor(np.full((columns, -(-blocks // 2)), 0x77, np.uint8), name="points")
        value = ir.Value(name="points", shape=points.shape, type=ir.TensorType(points.dtype), const_value=points)
        graph.initializers.add(value)
        node.resize_inputs(4)
        node.replace_input_with(3, value)

    edit_graph(out, each)


def other_block_size(out: Path) -> None:
    """Scales read as if blocks were twice as long, and half of them there."""

    def each(graph: ir.Graph) -> None:
        node = next(n for n in graph if n.op_type == "GatherBlockQuantized")
        node.attributes["bits"] = ir.AttrInt64("bits", 8)

    edit_graph(out, each)


def swapped_columns(out: Path) -> None:
    def each(views: dict[str, Any]) -> None:
        codes = [view for name, view in views.items() if "q_proj" in name]
        assert codes
        for view in codes:
            view[[0, 1]] = view[[1, 0]]

    edit_slices(out, each)


WRONG: dict[str, Callable[[Path], None]] = {
    "B's scales 2 % too large": change("ffba_B.weight", "scales", scaled),
    "one scale of A doubled": change("layers.1.mlp.ffba_A.weight", "scales", one_scale),
    "nibbles of B in the other order": change("layers.0.mlp.ffba_B.weight", "codes", swap_nibbles),
    "nibbles of the base in the other order": change("layers.1.mlp.up_proj.weight_t", "codes", swap_nibbles),
    "a block border off by one": change("layers.0.mlp.down_proj.weight_t", "codes", shift_block),
    "one code of A": change("layers.1.self_attn.ffba_A.weight", "codes", _flip),
    "scales of the embeddings off by one": change("embed_tokens.weight", "scales", shift_block),
    "another zero point": zero_point,
    "two columns swapped": swapped_columns,
}


@pytest.fixture(scope="module")
def right(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("quantized")
    adapter = make_adapter(base, directory / "adapter", alpha=16.0)
    build(adapter, str(base), directory / "right", options(check=False), silent)
    return adapter, directory / "right"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_quantized_artifact_is_caught_by_its_numbers(name: str, right: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    adapter, source = right
    out = Path(shutil.copytree(source, tmp_path / "out"))
    WRONG[name](out)
    assert (
        open_artifact(out).manifest.files["model.onnx.data"] != open_artifact(source).manifest.files["model.onnx.data"]
        or name == "another zero point"
    )
    report = verify(out, adapter, str(base), VerifyOptions(), silent)
    assert report.numerics is not None and report.numerics.causes, report.to_text()


def test_a_lost_scale_is_named(right: tuple[Path, Path], tmp_path: Path) -> None:
    from flora_export.artifact import seal

    out = Path(shutil.copytree(right[1], tmp_path / "out"))
    manifest = open_artifact(out).manifest
    lost = "base_model.model.model.layers.0.mlp.ffba_B.weight"
    entries = [e for e in manifest.ledger if not (e.tensor == lost and "scales" in e.form)]
    seal(out, dataclasses.replace(manifest, ledger=entries))
    assert any(
        fault == f"{lost} (adapter): has 1 slices of codes, but 0 of scales"
        for fault in verify(out, None, None, VerifyOptions(), silent).ledger.faults
    )


def test_the_price_is_a_gate(base: Path, adapter: Path, tmp_path: Path) -> None:
    allowed = dataclasses.replace(options(), max_quantization_loss=100.0)
    _, report = build(adapter, str(base), tmp_path / "out", allowed, silent)
    assert report.price is not None and 0 < report.price.kl_mean < 100
    with pytest.raises(VerificationError, match=r"quantization loss: .* nats per token"):
        build(adapter, str(base), tmp_path / "none", dataclasses.replace(allowed, max_quantization_loss=report.price.kl_mean / 2), silent)
    assert not (tmp_path / "none").exists()


def test_the_reports_say_what_it_costs(base: Path, adapter: Path, tmp_path: Path) -> None:
    artifact, report = build(adapter, str(base), tmp_path / "out", options(), silent)
    for text in (report.to_text(), markdown(report, "out"), verify_page(report, artifact)):
        assert "price of quantization" in text.lower() and "nats per token from the model as it was trained" in text
    cases = {case.get("name") for case in ET.fromstring(junit(report, "out")).iter("testcase")}
    assert {"as it runs", "price of quantization"} <= cases
    assert report.to_dict()["price"]["kl_mean"] > 0


@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("int8", 16)])
def test_a_base_that_was_quantized_for_training_has_the_same_bits(precision: str, block: int, base: Path, tmp_path: Path) -> None:
    """An adapter that is trained on it sees in training what it meets when it is served."""
    asked = ["quantize-base", str(base), "--precision", precision, "--block-size", str(block), "--output", str(tmp_path / "snapped")]
    result = CliRunner().invoke(main, [*asked, "--json"])
    assert result.exit_code == 0 and 0 < json.loads(result.stdout)["moved"] < 0.12
    adapter = make_adapter(tmp_path / "snapped", tmp_path / "adapter", alpha=16.0)
    chosen = options(precision, block_size=block)
    snapped, report = build(adapter, str(tmp_path / "snapped"), tmp_path / "one", chosen, silent)
    other, first = build(adapter, str(base), tmp_path / "two", chosen, silent)
    assert snapped.manifest.files["model.onnx.data"] == other.manifest.files["model.onnx.data"]
    assert report.price is not None and first.price is not None and report.price.adapter_loss is not None
    assert report.price.base_kl_mean < 1e-9 < first.price.base_kl_mean
    assert abs(report.price.effect_error - report.price.adapter_loss) < 1e-5  # the base costs nothing more
    again = CliRunner().invoke(main, asked)
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_what_is_not_for_quantization_is_refused(base: Path, adapter: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FloraExportError, match="quantize that checkpoint"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(backend="hf", precision="int4"), silent)
    with pytest.raises(FloraExportError, match="--block-size is for --precision int4 or int8, not fp32"):
        build(adapter, str(base), tmp_path / "out", options("fp32", block_size=32), silent)
    with pytest.raises(FloraExportError, match="--block-size 33: there are 16, 32"):
        load_backend("onnxruntime").options({"block_size": 33})
    gemma = bases("gemma2")
    narrow = make_adapter(gemma, tmp_path / "gemma")
    with pytest.raises(FloraExportError, match=r"its 80 inputs are no whole number of blocks of 32.*--head-precision keep"):
        build(narrow, str(gemma), tmp_path / "out", options(check=False), silent)
    assert not (tmp_path / "out").exists()


def test_a_lora_beside_a_quantized_base_keeps_its_precision(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "lora")
    kept = dataclasses.replace(options(adapter_precision="keep"), merge=False)
    artifact, report = build(lora, str(base), tmp_path / "out", kept, silent)
    assert report.verified and report.price is not None and report.price.adapter_loss is None
    assert {entry.form for entry in artifact.manifest.ledger if entry.origin == "adapter"} == {""}
    assert artifact.manifest.operators["after"]["MatMulNBits"] > 0
    with pytest.raises(FloraExportError, match=r"keeps its precision\. Pass --adapter-precision keep, or --merge"):
        build(lora, str(base), tmp_path / "no", dataclasses.replace(options(), merge=False), silent)
