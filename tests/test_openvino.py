"""OpenVINO: what is built is verified against eager PyTorch, proved from its own constants, and answered alike by OpenVINO GenAI."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from flora_export.artifact import GOLDEN, IR, IR_DATA, open_artifact, seal
from flora_export.backends import load_backend
from flora_export.base_model import load_base
from flora_export.cli import main
from flora_export.errors import ArtifactError, FloraExportError, FusionError, VerificationError
from flora_export.openvino_ir import read_constants
from flora_export.pipeline import BuildOptions, build
from flora_export.proof import check_ledger
from tests.conftest import ADAPTER, silent
from tests.families import FAMILIES, SHAPE, make_adapter, make_base, make_lora, make_speaking_base

ov = pytest.importorskip("openvino", reason="no OpenVINO: pip install 'flora-export[openvino]'", exc_type=ImportError)

OPENVINO = BuildOptions(backend="openvino")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openvino") / "out"
    build(adapter, str(base), out, OPENVINO, silent)
    return out


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def layers(path: Path) -> Counter[str | None]:
    return Counter(layer.get("type") for layer in ElementTree.parse(path / IR).getroot().iter("layer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_verified(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """`build` compares with eager PyTorch: prefill and cached steps, alone and in a ragged batch, windows shorter than the prompts."""
    gated = not family.startswith("starcoder2")
    ranks = {r"layers.1.mlp": 6, r"0.self_attn": 3}  # a mixed-up slice cannot fit
    adapter = make_adapter(bases(family), tmp_path / "adapter", rank_pattern=ranks, mlp_activation="gated" if gated else "identity")
    _, report = build(adapter, str(bases(family)), tmp_path / "out", OPENVINO, silent)
    assert report.numerics is not None and min(case.largest_effect for case in report.numerics.cases) > 0.01
    assert report.blocks and all(block.error <= block.allowed for block in report.blocks)


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp16"), ("gemma2", "fp16"), ("llama", "int8"), ("llama_tied", "int4")])
def test_precisions_are_verified(family: str, precision: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 2 in fp16 has a cache that its attention does not read through OpenVINO's own operator. Codes stay codes, and tied ones one."""
    adapter = make_adapter(bases(family), tmp_path / "adapter")
    artifact, report = build(adapter, str(bases(family)), tmp_path / "out", dataclasses.replace(OPENVINO, precision=precision), silent)
    assert report.numerics is not None and min(case.largest_effect for case in report.numerics.cases) > 0.01
    kinds = Counter(match for match in re.findall(r'element_type="(\w+)" shape="[\d, ]{5,}"', (artifact.path / IR).read_text()))
    expected = {"fp16": "f16", "int8": "u8", "int4": "u4"}[precision]
    assert kinds[expected] >= 14
    if precision != "fp16":
        entries = [entry for entry in artifact.manifest.ledger if entry.initializer.endswith("q_proj.weight_t")]
        assert {entry.form for entry in entries} == {f"int{precision[3:]} blocks codes, 32"}


def test_the_files(built: Path) -> None:
    """No ONNX is left; state instead of a cache; attention as OpenVINO's own operator; an adapter of which no GEMM is left."""
    manifest = open_artifact(built).manifest
    assert {IR, IR_DATA, "config.json", GOLDEN} <= manifest.files.keys() and "model.onnx" not in manifest.files
    assert [tensor.name for tensor in manifest.inputs] == ["input_ids", "attention_mask", "position_ids", "beam_idx"]
    assert [tensor.name for tensor in manifest.outputs] == ["logits"] and manifest.padding == "left"
    counts = layers(built)
    assert (counts["ReadValue"], counts["Assign"], counts["ScaledDotProductAttention"]) == (4, 4, 2)
    assert counts["MatMul"] == manifest.operators["before"]["MatMul"] == manifest.operators["after"]["MatMul"]
    options = ElementTree.parse(built / IR).getroot().find("rt_info/runtime_options")
    assert options is not None
    assert {child.tag: child.get("value") for child in options} == {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def test_a_build_repeated_gives_the_same_bytes(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    again, _ = build(adapter, str(base), tmp_path / "again", OPENVINO, silent)
    assert again.manifest.files == open_artifact(built).manifest.files


def test_silenced_it_is_the_base_model(built: Path, base: Path, tmp_path: Path) -> None:
    """Without its adapter it answers as the base model built by itself does, and with it otherwise."""
    artifact, backend = open_artifact(built), load_backend("openvino")
    prompt = [[3, 4, 5, 6, 7]]
    (bare,), (own,) = (backend.decode(artifact, adapter=adapter).start(prompt) for adapter in (False, True))
    (alone,) = backend.decode_base(artifact, load_base(str(base)), tmp_path).start(prompt)
    assert np.abs(bare - alone).max() < 1e-5 and np.abs(own - bare).max() > 0.01
    golden = load_file(built / GOLDEN)
    logits = backend.decode(artifact).start([golden["prompt.0.input_ids"].tolist()])[0][-1]
    assert np.abs(logits - golden["prompt.0.logits"][0]).max() < 1e-3


def test_the_ledger_is_read_from_the_ir(out: Path) -> None:
    """One bit of one number of one B, the hashes of the files made right again: the ledger names the tensor."""
    artifact = open_artifact(out)
    entry = next(e for e in artifact.manifest.ledger if e.origin == "adapter" and "ffba_B" in e.tensor)
    tensor = read_constants(out)[entry.initializer]
    tensor.release()
    place = tensor.offset + entry.start * tensor.shape[1] * 4 + 2
    data = bytearray((out / IR_DATA).read_bytes())
    data[place] ^= 1
    (out / IR_DATA).write_bytes(data)
    faults = check_ledger(seal(out, artifact.manifest)).faults
    assert len(faults) == 1 and entry.tensor in faults[0]


def test_a_weight_that_no_ledger_knows(out: Path) -> None:
    artifact = open_artifact(out)
    kept = [entry for entry in artifact.manifest.ledger if "layers.1.mlp.down_proj" not in entry.initializer]
    faults = check_ledger(seal(out, dataclasses.replace(artifact.manifest, ledger=kept))).faults
    assert any("down_proj" in fault and "not in the ledger" in fault for fault in faults)


@pytest.mark.parametrize(
    ("pattern", "replacement", "reason"),
    [
        (r'<\?xml version="1.0"\?>', '<!DOCTYPE a [<!ENTITY b "c">]>', "declaration"),
        (r'offset="\d+" size="(\d{4,})"', r'offset="99999999" size="\1"', IR_DATA),
        (r'offset="\d+" size="(\d{4,})"', r'offset="-1" size="\1"', IR_DATA),
        (r'shape="\d+, \d+"', 'shape="64, 99999999999999999999"', IR_DATA),
        (r"</net>", "", "ParseError"),
        (r'to-layer="\d+" to-port="1"', 'to-layer="0" to-port="1"', "is not in openvino_model.xml"),  # right, but nothing reads it
        (r'type="Const"', 'type="Constant"', "a Constant as OpenVINO writes none"),
        (r'element_type="f32"', 'element_type="f99"', "f99"),
    ],
)
def test_a_damaged_ir_is_refused(out: Path, pattern: str, replacement: str, reason: str) -> None:
    text = (out / IR).read_text()
    damaged = re.sub(pattern, replacement, text)
    assert damaged != text
    (out / IR).write_text(damaged)
    try:
        faults = check_ledger(seal(out, open_artifact(out).manifest)).faults
    except ArtifactError as error:
        faults = [str(error)]
    assert any(reason in fault for fault in faults), faults
    assert run("verify", out).exit_code in (1, 2)


def test_other_weights_beside_the_ir(out: Path) -> None:
    """A ledger is checked on what the runtime loads: files that another would load are not of this artifact."""
    artifact = open_artifact(out)
    for name in ("model.onnx", "model.onnx.data"):
        (out / name).write_bytes(b"")
    assert any("model.onnx was not built" in fault for fault in check_ledger(artifact).faults)
    with pytest.raises(ArtifactError, match=r"does not load model.onnx, model.onnx.data"):
        open_artifact(seal(out, artifact.manifest).path)
    with pytest.raises(ArtifactError, match=r"does not load openvino_model"):
        open_artifact(seal(out, dataclasses.replace(artifact.manifest, backend="onnxruntime")).path)


def test_a_state_that_is_no_cache(out: Path) -> None:
    text = (out / IR).read_text()
    (out / IR).write_text(text.replace("past_key_values.1.valuepresent.1.value", "nothing"))
    seal(out, open_artifact(out).manifest)
    result = run("verify", out)
    assert result.exit_code == 2 and "state 'nothing'" in result.stderr


def test_what_openvino_itself_refuses_is_a_backend_error(out: Path) -> None:
    (out / IR).write_text((out / IR).read_text().replace('type="MatMul"', 'type="Nothing"'))
    result = run("generate", out, "3", "--raw")
    assert result.exit_code in (2, 3) and "Traceback" not in result.output


def test_localise(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that loses an adapter fails the build, which names the block and the stage."""
    from flora_export.backends.openvino import convert
    from flora_export.backends.openvino.edited import constants_of, products_of

    read = convert.read_onnx

    def lossy(file: Path) -> Any:
        model = read(file)
        constant = constants_of(model)["model.layers.1.self_attn.o_proj.weight_t"]
        (product,) = products_of(constant)
        values = constant.data.copy()
        values[-4:] = 0  # B's rows
        other = convert.op.constant(values)
        other.set_friendly_name(constant.get_friendly_name())
        product.input(1).replace_source_output(other.output(0))
        return model

    monkeypatch.setattr(convert, "read_onnx", lossy)
    with pytest.raises(VerificationError) as failed:
        build(adapter, str(base), tmp_path / "out", OPENVINO, silent)
    assert "written file, layer 1: model.layers.1.self_attn" in str(failed.value)
    assert "ffba_B" in str(failed.value)  # and the ledger the tensor
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_lora(merge: bool, base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "lora")
    _, report = build(lora, str(base), tmp_path / "out", dataclasses.replace(OPENVINO, merge=merge), silent)
    assert report.numerics is not None and min(case.largest_effect for case in report.numerics.cases) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "cuda"), "does not build for cuda"),
        (("--precision", "bf16"), "bf16"),
        (("--kv-cache", "static:64"), "--kv-cache is no option of --backend openvino"),
        (("--precision", "int8", "--align", 3), "Choose a --block-size that divides it"),
        (("--slots", 2), "takes one adapter"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[object, ...], message: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("build", adapter, "--base", base, "--backend", "openvino", "--output", tmp_path / "out", *options)
    assert result.exit_code in (2, 3) and message in result.stderr and not (tmp_path / "out").exists()


def test_a_block_that_is_not_whole(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma's width here is 80: two blocks and a half of 32."""
    adapter = make_adapter(bases("gemma"), tmp_path / "adapter")
    quantized = dataclasses.replace(OPENVINO, precision="int8")
    with pytest.raises((FusionError, FloraExportError), match="Choose a --block-size that divides it"):
        build(adapter, str(bases("gemma")), tmp_path / "out", quantized, silent)


def test_commands(built: Path, base: Path, adapter: Path) -> None:
    assert run("verify", built).exit_code == 0
    assert run("verify", built, "--ckpt", adapter, "--base", base, "--localise").exit_code == 0
    explained = json.loads(run("explain", built, "--json").stdout)
    assert explained["ok"] and {block["fusion"] for block in explained["blocks"]} == {"neurons", "forward+backward"}
    assert "holds no ONNX graph" in run("explain", built, "--lint").stderr
    assert "cannot serve an artifact of backend openvino" in run("triton", built, built.parent / "repository").stderr
    assert "a host brings its own" in run("explain", built).stdout.lower()  # the tiny base has no tokenizer
    short = ("--prompt-tokens", 8, "--past-tokens", 8, "--new-tokens", 2)
    measured = run("bench", built, "--base", base, "--arms", "base,fused,lora", "--rounds", 3, *short, "--json")
    assert measured.exit_code == 0, measured.output
    rows = json.loads(measured.stdout)["measurements"]
    assert {row["arm"] for row in rows} == {"base", "fused", "lora"} and {row["metric"] for row in rows} == {"ttft", "tpot", "total"}


def test_a_device_that_is_not_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The CPU stands for it, and the report says so; eager PyTorch is timed where it can be."""
    _, report = build(adapter, str(base), tmp_path / "out", dataclasses.replace(OPENVINO, target="npu"), silent)
    assert report.environment["runtime"].endswith("NPU itself was not run")
    short = ("--prompt-tokens", 8, "--past-tokens", 8, "--new-tokens", 2, "--rounds", 3)
    measured = run("bench", tmp_path / "out", "--base", base, "--arms", "base,eager,fused", *short)
    assert measured.exit_code == 0 and "stay on the device" not in measured.stdout


def test_what_is_timed_is_the_same_step(built: Path) -> None:
    """The benchmark's step, each time after the same prompt, gives what a decoder's does."""
    backend, artifact, prompt = load_backend("openvino"), open_artifact(built), np.arange(3, 14)[None]
    decoder, timed = backend.decode(artifact), backend.timed(artifact, 1)
    decoder.start(prompt.tolist())
    expected = decoder.step([5])
    cache = timed.cache_after(timed.run(timed.bind(timed.feeds(prompt, 0), timed.empty_cache(1))))
    for _ in range(2):
        timed.run(timed.bind(timed.feeds(np.array([[5]]), prompt.shape[1]), cache))
        assert np.abs(timed.decoder.request.get_output_tensor(0).data[:, -1] - expected).max() < 1e-5


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model with sliding windows shorter than its prompts, and a tokenizer."""
    import transformers as tf

    root = tmp_path_factory.mktemp("windowed")
    speaking = make_speaking_base(root / "speaking")
    vocabulary = json.loads((speaking / "config.json").read_text())["vocab_size"]
    shape = SHAPE | {"vocab_size": vocabulary, "max_position_embeddings": 2048}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "windowed", lambda: tf.MistralConfig(**shape, head_dim=16, sliding_window=8))
        base = make_base("windowed", root / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (speaking / name).exists():
            shutil.copyfile(speaking / name, base / name)
    artifact, _ = build(make_adapter(base, root / "adapter"), str(base), root / "out", OPENVINO, silent)
    return artifact.path


@pytest.mark.parametrize("attention", ["PA", "SDPA"])
def test_openvino_genai_gives_the_recorded_tokens(windowed: Path, attention: str) -> None:
    """Paged attention, GenAI's default, drops a mask: it must know the window by its pattern."""
    genai = pytest.importorskip("openvino_genai", reason="no openvino-genai", exc_type=ImportError)
    golden = load_file(windowed / GOLDEN)
    pipe = genai.LLMPipeline(str(windowed), "CPU", ATTENTION_BACKEND=attention, INFERENCE_PRECISION_HINT="f32")
    answers = []
    for index in range(2):
        config = genai.GenerationConfig(max_new_tokens=len(golden[f"prompt.{index}.tokens"]), do_sample=False, ignore_eos=True)
        ids = ov.Tensor(golden[f"prompt.{index}.input_ids"][None])
        answers.append(list(pipe.generate(ids, config).tokens[0]))
    assert answers == [golden[f"prompt.{index}.tokens"].tolist() for index in range(2)]
    decoder = load_backend("openvino").decode(open_artifact(windowed), adapter=False)
    (bare,) = decoder.start([golden["prompt.0.input_ids"].tolist()])
    steps = [int(bare[-1].argmax())]
    while len(steps) < len(answers[0]):
        steps.append(int(decoder.step(steps[-1:])[0].argmax()))
    assert steps != answers[0]  # the base model's own tokens are others


def test_the_tokenizer_is_a_graph(windowed: Path) -> None:
    pytest.importorskip("openvino_genai", reason="no openvino-genai", exc_type=ImportError)
    import openvino_genai
    from transformers import AutoTokenizer

    text = "the answer is what you ask"
    ids = openvino_genai.Tokenizer(str(windowed)).encode(text).input_ids.data[0].tolist()
    assert ids == AutoTokenizer.from_pretrained(windowed)(text)["input_ids"]


@pytest.mark.real
def test_smollm2_answers_in_openvino_genai(smollm2: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="no openvino-genai", exc_type=ImportError)
    build(ADAPTER, str(smollm2), tmp_path / "out", dataclasses.replace(OPENVINO, precision="int8", verify=False), silent)
    question = "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?"
    pipe = genai.LLMPipeline(str(tmp_path / "out"), "CPU", INFERENCE_PRECISION_HINT="f32")
    assert pipe.generate(question, max_new_tokens=64, do_sample=False) == "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18"
