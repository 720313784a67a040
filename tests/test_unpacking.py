"""Base models that are quantized already: their integers are kept, bit for bit, and what is not read is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from flora_export.backends.quantizing import QuantizationOptions
from flora_export.base_model import load_base
from flora_export.cli import main
from flora_export.errors import CheckpointError, FloraExportError
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.quantization import Quantization
from tests.conftest import silent
from tests.families import make_adapter, make_lora
from tests.mutate import edit

Weights = dict[str, Any]
Q = "model.layers.0.self_attn.q_proj."


def quantized_copy(base: Path, directory: Path, method: str, bits: int = 4, group: int = 32, says: Weights | None = None) -> Path:
    """A base model as other tools quantize it: scales in fp16, of no block's largest number, so that rounding anew would move them."""
    shutil.copytree(base, directory)
    tensors, packed = load_file(base / "model.safetensors"), {}
    half, count = 1 << (bits - 1), 32 // bits
    for name, weight in tensors.items():
        if ".layers." not in name or weight.ndim != 2:
            packed[name] = weight
            continue
        blocks = weight.reshape(len(weight), -1, group)
        scales = (np.abs(blocks).max(axis=-1) / half * 0.9).astype(np.float16)
        codes = np.clip(np.round(blocks / scales[..., None].astype(np.float32)), -half, half - 1).astype(np.int32) + half
        words = _words(codes.reshape(len(weight), -1, count).astype(np.uint32), bits)
        at = name.removesuffix("weight")
        if method == "gptq":
            packed[f"{at}qweight"], packed[f"{at}scales"] = np.ascontiguousarray(words.T), np.ascontiguousarray(scales.T)
            byte = (half - 1) * (0x11 if bits == 4 else 1)
            packed[f"{at}qzeros"] = np.full((scales.shape[1], len(weight) // count, 4), byte, np.uint8).view(np.int32)[..., 0]
            packed[f"{at}g_idx"] = (np.arange(weight.shape[1]) // group).astype(np.int32)
        else:
            packed[f"{at}weight_packed"], packed[f"{at}weight_scale"] = words, scales
            packed[f"{at}weight_shape"] = np.array(weight.shape, np.int64)
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    said: Weights = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False}
    if method != "gptq":
        weights = {"num_bits": bits, "group_size": group, "symmetric": True, "strategy": "group", "type": "int"}
        said = {
            "quant_method": method,
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": said | (says or {})}))
    return directory


def _words(values: Any, bits: int) -> Any:
    words = np.zeros(values.shape[:-1], np.uint32)
    for index in range(values.shape[-1]):
        words |= values[..., index] << np.uint32(bits * index)
    return words.view(np.int32)


@pytest.mark.parametrize(
    ("method", "bits", "group"), [("gptq", 4, 32), ("gptq", 8, 32), ("compressed-tensors", 4, 16), ("compressed-tensors", 8, 32)]
)
def test_its_integers_are_kept(method: str, bits: int, group: int, base: Path, tmp_path: Path) -> None:
    own = quantized_copy(base, tmp_path / "own", method, bits, group)
    adapter = make_adapter(base, tmp_path / "adapter", alpha=16.0)
    artifact, report = build(adapter, str(own), tmp_path / "out", BuildOptions(precision=f"int{bits}"), silent)
    assert report.verified and report.price is not None
    assert artifact.manifest.quantization is not None and artifact.manifest.quantization.block_size == group
    found = load_base(str(own))
    assert found.packed is not None and found.digests == artifact.manifest.base["files"]
    initializers = ir.load(artifact.model).graph.initializers
    kept = 0
    for entry in artifact.manifest.ledger:
        tensor = initializers[entry.initializer].const_value
        name = entry.tensor.removesuffix("_t")
        if entry.origin == "base" and name in found.packed.modules and tensor is not None:
            codes, scales = found.packed.read(name)
            written = tensor.numpy()[(slice(None),) * entry.axis + (slice(entry.start, entry.stop),)]
            assert np.array_equal(written, codes if "codes" in entry.form else scales), entry.tensor
            kept += 1
    assert kept >= 2 * 2 * 3
    assert report.price.base_kl_mean < 1e-4  # embeddings and head alone were rounded
    edit(tmp_path / "out", _bend, forge=True)
    again = verify(tmp_path / "out", adapter, str(own), VerifyOptions(), silent)
    assert any("the base model's own integers" in fault for fault in again.ledger.faults)
    assert again.numerics is not None and again.numerics.causes


def _bend(entry: Any, view: Any) -> None:
    if entry.tensor == "model.layers.1.mlp.up_proj.weight_t" and "codes" in entry.form:
        view[0] ^= 1


def test_a_lora_is_merged_into_it_and_rounded_anew(base: Path, tmp_path: Path) -> None:
    own = quantized_copy(base, tmp_path / "own", "gptq")
    lora = make_lora(base, tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    artifact, report = build(lora, str(own), tmp_path / "out", BuildOptions(precision="int4", allow_vacuous=True), silent)
    assert report.verified and report.ledger.changed_tensors_equal == len(artifact.manifest.changes)


def test_other_precisions_take_the_weights_that_it_stands_for(base: Path, tmp_path: Path) -> None:
    own = quantized_copy(base, tmp_path / "own", "gptq")
    for options in (BuildOptions(), BuildOptions(backend="hf")):
        adapter = make_adapter(base, tmp_path / options.backend, target_modules=["mlp"])
        _, report = build(adapter, str(own), tmp_path / f"out-{options.backend}", options, silent)
        assert report.verified
    with pytest.raises(FloraExportError, match=r"the base model has int4 in blocks of 32 \(gptq\).*build with --precision int4"):
        build(adapter, str(own), tmp_path / "no", BuildOptions(precision="int8"), silent)
    with pytest.raises(FloraExportError, match="without --block-size"):
        build(adapter, str(own), tmp_path / "no", BuildOptions(precision="int4", settings=QuantizationOptions(block_size=16)), silent)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": ("gptq", {"quant_method": "awq"}, "quant_method 'awq', but read are gptq, compressed-tensors"),
    "order of activations": ("gptq", {"desc_act": True}, "desc_act or sym = false"),
    "asymmetric": ("gptq", {"sym": False}, "desc_act or sym = false"),
    "three bits": ("gptq", {"bits": 3}, "has 3 bits in groups of 32"),
    "a group for each row": ("gptq", {"group_size": -1}, "in groups of -1"),
    "the second format with the first one's zero points": ("gptq", {"checkpoint_format": "gptq_v2"}, "qzeros holds zero points"),
    "floating point": ("compressed-tensors", {"format": "float-quantized"}, "format 'float-quantized'"),
    "no groups": ("compressed-tensors", {"config_groups": {}}, "one group of layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    method, changes, words = REFUSED[name]
    with pytest.raises(CheckpointError, match=words) as error:
        load_base(str(quantized_copy(base, tmp_path / "own", method, says=changes)))
    assert "Take the original model" in str(error.value)


def _drop(tensors: Weights, ending: str) -> None:
    for name in [name for name in tensors if name.endswith(ending)]:
        del tensors[name]


DAMAGE: dict[str, tuple[Callable[[Weights], None], str]] = {
    "scales of another shape": (
        lambda t: t.update({Q + "scales": t[Q + "scales"][:1]}),
        r"q_proj.scales is \(1, 64\), but .* needs \(2, 64\)",
    ),
    "inputs in another order": (lambda t: t.update({Q + "g_idx": t[Q + "g_idx"][::-1].copy()}), "g_idx orders its inputs otherwise"),
    "zero points": (lambda t: t.update({Q + "qzeros": t[Q + "qzeros"] + 1}), "qzeros holds zero points that are not the middle"),
    "nothing quantized": (lambda t: _drop(t, "qweight"), "but no tensor of it is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    break_it, words = DAMAGE[name]
    own = quantized_copy(base, tmp_path / "own", "gptq")
    tensors = load_file(own / "model.safetensors")
    break_it(tensors)
    save_file(tensors, own / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_base(str(own))


def test_it_is_not_quantized_again_to_train_on(base: Path, tmp_path: Path) -> None:
    own = quantized_copy(base, tmp_path / "own", "gptq")
    result = CliRunner().invoke(main, ["quantize-base", str(own), "--precision", "int4", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "is quantized already (gptq)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_quantization_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="block_size is 48"):
        Quantization(4, 48, 8, 4, "fp32")
