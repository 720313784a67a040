"""Models larger than memory, at tiny size: mapped weights give the very numbers of loaded ones, and a verification of them judges alike."""

from __future__ import annotations

import errno
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from flora_export import base_model
from flora_export.backends import mapped_weights
from flora_export.backends.mapped_weights import multiply_tables_as_they_lie
from flora_export.backends.onnxruntime import Decoder
from flora_export.base_model import SINGLE, BaseModel, load_base
from flora_export.cli import main
from flora_export.errors import CheckpointError
from flora_export.mapped import load_mapped
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.quantization import Quantization
from flora_export.reference import Reference
from flora_export.verify.quantized_reference import QuantizedReference
from tests.conftest import silent
from tests.families import FAMILIES, make_adapter, make_base, make_lora
from tests.test_unpacking import quantized_copy

ROWS = [[5, 9, 77, 3, 40, 41], [7, 8, 9]]


def in_sixteen_bits(base: Path) -> Path:
    """The base with weights in bfloat16, as most are published: read into fp32 they are other bytes than in the file."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / SINGLE).items()}
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    return base


def both(base: BaseModel, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Reference, Reference]:
    """(loaded, mapped)"""
    loaded = Reference(base, adapter)
    monkeypatch.setattr(base_model, "LARGE", 0)
    return loaded, Reference(base, adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_weights_compute_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = in_sixteen_bits(make_base(family, tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter", **({"mlp_activation": "silu"} if family.startswith("starcoder2") else {}))
    loaded, mapped = both(load_base(str(base)), adapter, monkeypatch)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert {parameter.dtype for name, parameter in mapped.model.named_parameters() if "ffba_" not in name} == {torch.bfloat16}
    assert mapped.greedy(ROWS, 5) == loaded.greedy(ROWS, 5)
    for precision in ("fp32", "fp16"):
        for adapted in (True, False):
            asked = [reference.to_precision(precision).logits(ROWS, adapter=adapted) for reference in (loaded, mapped)]
            asked.append(loaded.exact_logits(ROWS, adapter=adapted))
            asked.append(mapped.exact_logits(ROWS, adapter=adapted))
            for row in range(2):
                np.testing.assert_array_equal(asked[0][row], asked[1][row])
                np.testing.assert_array_equal(asked[2][row], asked[3][row])
                assert not np.array_equal(asked[0][row], asked[2][row])


@pytest.mark.parametrize(
    ("config", "maps"), [({}, True), ({"use_dora": True}, True), ({"modules_to_save": ["lm_head"]}, False), ({"bias": "all"}, False)]
)
def test_what_an_adapter_puts_in_the_place_of_the_bases_own_is_not_rounded(
    config: dict[str, object], maps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = in_sixteen_bits(make_base("qwen2", tmp_path / "base"))
    loaded, mapped = both(load_base(str(base)), make_lora(base, tmp_path / "lora", **config), monkeypatch)
    assert (torch.bfloat16 in {parameter.dtype for parameter in mapped.model.parameters()}) == maps
    for one, other in zip(loaded.exact_logits(ROWS), mapped.exact_logits(ROWS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_head_that_is_tied_is_mapped_with_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tied checkpoints have no tensor for it."""
    base = in_sixteen_bits(make_base("llama_tied", tmp_path / "base"))
    assert "lm_head.weight" not in load_file(base / SINGLE)
    loaded, mapped = both(load_base(str(base)), make_adapter(base, tmp_path / "adapter"), monkeypatch)
    model = mapped.model.get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.logits(ROWS)[0], mapped.logits(ROWS)[0])


def test_weights_by_other_names_are_loaded(tmp_path: Path) -> None:
    """As where transformers joins the tensors of a file, or renames them: no part of the model stays empty."""
    base = make_base("llama", tmp_path / "base")
    tensors = load_file(base / SINGLE)
    assert load_mapped(load_base(str(base))) is not None
    tensors["model.layers.0.mlp.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    assert load_mapped(load_base(str(base))) is None


@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "fp32"), ("llama", "fp16"), ("llama", "int4"), ("llama_tied", "fp32"), ("llama_tied", "fp16"), ("llama_tied", "int8")],
)
def test_a_large_artifact_is_verified(
    family: str, precision: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runtime maps the weights, and says so; another adapter than the one that is in it is still another one."""
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(base_model, "LARGE", 0)
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(precision=precision, quick=True), silent)
    assert report.verified
    assert "weights mapped" in report.environment["runtime"]
    assert report.numerics is not None and report.numerics.quick
    names = [case.name for case in report.numerics.cases]
    assert "ragged batch, row 0" in names and "single token" in names and "near the context's end" in names
    assert not any(name.startswith("prompt") for name in names)
    assert "quick: the prompts as one batch; not each by itself" in report.to_text()
    other = make_adapter(base, tmp_path / "other", seed=9)
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--ckpt", str(other), "--base", str(base), "--quick"])
    assert done.exit_code == 1
    assert "wrong adapter" in done.stdout + done.stderr


def _lora(base: Path, directory: Path) -> Path:
    return make_lora(base, directory, use_dora=True)


@pytest.mark.parametrize("own", [make_adapter, _lora], ids=["beside", "merged"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_large_quantized_reference_is_mapped(
    own: Callable[[Path, Path], Path], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From temporary files, which go with it."""
    plain = in_sixteen_bits(make_base("llama_tied", tmp_path / "plain"))
    base = load_base(str(quantized_copy(plain, tmp_path / "base", "gptq") if packed else plain))
    checkpoint, quantization = load_checkpoint(own(plain, tmp_path / "adapter"), base), Quantization(4, 32, 8, 4, "fp32")
    loaded = QuantizedReference(base, checkpoint, quantization)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    monkeypatch.setattr(base_model, "LARGE", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mapped = QuantizedReference(base, checkpoint, quantization)
    written = sum(path.stat().st_size for path in (tmp_path / "temporary").rglob("*.safetensors"))
    assert written > 4 * base.vocabulary * base.width
    for adapted in (True, False):
        for ask in (Reference.logits, Reference.exact_logits):
            for row, same in zip(*(ask(each, ROWS, adapter=adapted) for each in (loaded, mapped)), strict=True):
                np.testing.assert_array_equal(row, same)
    del mapped
    gc.collect()
    assert not any((tmp_path / "temporary").iterdir())


def test_no_room_for_a_large_quantized_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(base_model, "LARGE", 0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flora_export.verify.quantized_reference.save_file", full)
    with pytest.raises(CheckpointError, match=r"quantized base model, in fp32, does not fit into .*No space left.* TMPDIR"):
        build(adapter, str(base), tmp_path / "out", BuildOptions(precision="int4", quick=True), silent)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_multiplied_as_it_lies(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama_tied")
    artifact, _ = build(make_adapter(base, tmp_path / "adapter"), str(base), tmp_path / "out", BuildOptions(verify=False), silent)
    graph = artifact.model.read_bytes()
    edited = multiply_tables_as_they_lie(graph)
    before, after = (Counter(node.op_type for node in onnx.ModelProto.FromString(each).graph.node) for each in (graph, edited))
    assert (after["FusedMatMul"], after["Transpose"]) == (1, before["Transpose"] - 1)
    one, other = (Decoder(artifact, graph=each).start(ROWS) for each in (graph, edited))
    for row in range(2):
        np.testing.assert_allclose(one[row], other[row], atol=1e-5 * np.abs(one[row]).max())  # fp32: sums in another order


def test_mapped_weights_are_cast_one_at_a_time(bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them before the first is multiplied: that would be the whole model in fp32."""
    base = bases("llama")
    fp16 = BuildOptions(precision="fp16", verify=False)
    artifact, _ = build(make_adapter(base, tmp_path / "adapter"), str(base), tmp_path / "out", fp16, silent)
    weights = {tensor.name for tensor in onnx.load(artifact.model, load_external_data=False).graph.initializer if len(tensor.dims) == 2}
    keep = mapped_weights.keep_weights_mapped

    def profiled(options: ort.SessionOptions) -> None:
        keep(options)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")

    monkeypatch.setattr(base_model, "LARGE", 0)
    monkeypatch.setattr("flora_export.backends.onnxruntime.keep_weights_mapped", profiled)
    decoder = Decoder(artifact, exact=True)
    decoder.start(ROWS)
    events = json.loads(Path(decoder.session.end_profiling()).read_text())
    ran = [event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"]
    waiting = most = casts = 0
    for node in ran:
        if any(node.endswith(f"Cast_{weight}") for weight in weights):
            waiting, casts = waiting + 1, casts + 1
        elif "MatMul" in node:
            waiting = max(0, waiting - 1)
        most = max(most, waiting)
    if casts:  # none on a CPU that multiplies in fp16
        assert casts > 10 and most <= 2


def test_quick_needs_something_to_compare_with(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(tmp_path), "--quick"])
    assert done.exit_code == 2
    assert "--quick needs --ckpt" in done.stderr
