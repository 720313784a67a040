"""What the campaign's hostile input once broke, each with the bytes that did it."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.campaign import fuzz_seeds as seeds
from flora_export.artifact import DATA, MANIFEST, MODEL, open_artifact
from flora_export.base_model import load_base, read_json
from flora_export.bounded import bounded
from flora_export.cli import main
from flora_export.cli.common import one_line, printable
from flora_export.convert import convert
from flora_export.errors import ArtifactError, CheckpointError
from flora_export.ledger import load_graph
from flora_export.methods import load_checkpoint
from flora_export.proof import check_ledger
from flora_export.verify.golden import recorded_prompts
from flora_export.verify.prompts import load_tokenizer
from flora_export.written import read_written


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_sound_artifact_of_the_seeds_has_no_fault(tmp_path: Path) -> None:
    """Else what follows would fail for another reason than it says."""
    artifact = seeds.write_artifact(tmp_path / "out")
    assert check_ledger(open_artifact(artifact.path)).faults == []


@pytest.mark.parametrize(
    "changes",
    [
        {"operators": {"before": {"MatMul": "2"}, "after": {}}},
        {"operators": {"before": [], "after": 1}},
        {"align": 0},
        {"cache_tokens": -1},
        {"checkpoint": {"digest": "0", "config": {}, "tensors": [[]]}},
        {"checkpoint": {"digest": "0", "config": {}, "tensors": 7}},
        {"base": {"name": "b", "files": {"a": 1}}},
        {"base": {"files": {"a": "0"}}},
        {"versions": {"onnxruntime": 1}},
        {"passes": [1]},
        {"align": 2**63},
        {"files": {"model.onnx": {"sha256": "0", "bytes": True}}},
        {"files": {"x" * 5000: {"sha256": "0", "bytes": 1}}},
        {"fuse": "\ud800"},
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_a_manifest_is_checked_to_its_leaves(tmp_path: Path, changes: dict[str, Any]) -> None:
    out = seeds.write_artifact(tmp_path / "out").path
    known = json.loads((out / MANIFEST).read_text())
    if "files" in changes:
        changes = {"files": known["files"] | changes["files"]}
    edit(out / MANIFEST, **changes)
    with pytest.raises(ArtifactError, match=MANIFEST):
        open_artifact(out)


@pytest.mark.parametrize(
    ("record", "changes"),
    [
        ("blocks", {"reads": [1]}),
        ("blocks", {"scale": float("nan")}),
        ("changes", {"scale": 10**400}),
        ("ledger", {"stop": 10**30}),
        ("outputs", {"shape": [None]}),
    ],
)
def test_so_are_its_records(tmp_path: Path, record: str, changes: dict[str, Any]) -> None:
    out = seeds.write_artifact(tmp_path / "out").path
    edit(out / MANIFEST, **{record: [each | changes for each in json.loads((out / MANIFEST).read_text())[record]]})
    with pytest.raises(ArtifactError, match="not a manifest"):
        open_artifact(out)


def test_a_message_is_not_as_long_as_the_file(tmp_path: Path) -> None:
    out = seeds.write_artifact(tmp_path / "out").path
    edit(out / MANIFEST, bank={"layout": "stack", "names": ["a"] * 10_000, "digests": []})
    with pytest.raises(ArtifactError) as caught:
        open_artifact(out)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("axis", [10**12, 2, -1])
def test_an_axis_that_cannot_be(tmp_path: Path, axis: int) -> None:
    """10^12 of anything in a tuple are terabytes."""
    out = seeds.write_artifact(tmp_path / "out").path
    edit(out / MANIFEST, ledger=[each | {"axis": axis} for each in json.loads((out / MANIFEST).read_text())["ledger"]])
    assert any(f"along axis {axis}, which cannot be" in fault for fault in check_ledger(open_artifact(out)).faults)


def test_outputs_without_a_vocabulary(tmp_path: Path) -> None:
    out = seeds.write_artifact(tmp_path / "out").path
    edit(out / MANIFEST, outputs=[{"name": "logits", "dtype": "FLOAT", "shape": []}])
    with pytest.raises(ArtifactError, match="how many logits"):
        recorded_prompts(open_artifact(out))


@pytest.mark.parametrize("name", [MODEL, DATA])
@pytest.mark.parametrize("how", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_a_graph_that_is_no_file(tmp_path: Path, name: str, how: Callable[[Path], None]) -> None:
    """Opened, a pipe waits for ever, and a device ends never."""
    artifact = seeds.write_artifact(tmp_path / "out")
    (artifact.path / name).unlink()
    how(artifact.path / name)
    with pytest.raises(ArtifactError, match=f"{name} is missing, or no file"):
        load_graph(artifact)


@pytest.mark.parametrize("length", ["0", "60", str(2**63 - 1)])
def test_a_weight_of_another_length(tmp_path: Path, length: str) -> None:
    import onnx

    artifact = seeds.write_artifact(tmp_path / "out")
    model = onnx.load(artifact.model, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "length").value = length
    artifact.model.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=f"w has {length} bytes in .*, but needs 64"):
        read_written(artifact)


def test_a_weight_that_is_text(tmp_path: Path) -> None:
    import onnx

    artifact = seeds.write_artifact(tmp_path / "out")
    model = onnx.load(artifact.model, load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING
    artifact.model.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="w is no array of numbers"):
        read_written(artifact)


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude00 is whole"}')
    assert read_json(tmp_path / "a.json", "file")["a"].endswith("whole")
    (tmp_path / "a.json").write_text('{"a": "\\ud83d is not"}')
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        read_json(tmp_path / "a.json", "file")


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_base("x/" * 5000)
    base = seeds.write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="leaves the model's directory"):
        load_base(str(base))


def test_a_link_beside_the_weights_stays_inside(tmp_path: Path) -> None:
    """It would be copied into every artifact. As the hub's cache has it, with the files in blobs/, it is one model."""
    (tmp_path / "secret").write_text("secret")
    snapshot, blobs = seeds.write_base(tmp_path / "hub" / "snapshots" / "1"), tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (snapshot / "config.json").rename(blobs / "0123")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    assert load_base(str(snapshot)).width == seeds.WIDTH
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link to .*secret, outside"):
        load_base(str(snapshot))


def test_links_and_sizes_that_never_end(tmp_path: Path) -> None:
    base = seeds.write_base(tmp_path / "base")
    (base / "tokenizer.json").symlink_to("tokenizer.json")
    assert load_base(str(base)).width == seeds.WIDTH  # a link to itself is no file: there is no tokenizer
    (base / "tokenizer.json").unlink()
    with (base / "tokenizer.json").open("wb") as stream:
        stream.truncate(2**33)
    with pytest.raises(CheckpointError, match="any tokenizer needs"):
        load_base(str(base))
    header = b"{" + b" " * (17 * 2**20) + b"}"
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has a header of 17825794 bytes"):
        load_base(str(base))


def test_sizes_beyond_all_weights(tmp_path: Path) -> None:
    base = seeds.write_base(tmp_path / "base")
    edit(base / "config.json", head_dim=10**9)
    with pytest.raises(CheckpointError, match="head_dim is 1000000000, but no weight has a side of more than 16"):
        load_base(str(base))


def test_a_method_of_peft_that_counts_for_ever(tmp_path: Path) -> None:
    base = load_base(str(seeds.write_base(tmp_path / "base")))
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": -(10**30), "target_modules": ["q_proj"]}
    adapter = seeds.write_adapter(tmp_path / "adapter", config, seeds.lora_tensors())
    with pytest.raises(CheckpointError, match=r"oft_block_size is -1000.*a whole number from -1 to 65536"):
        load_checkpoint(adapter, base)


def test_a_type_that_triton_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient")
    from flora_export.backends.triton.check import config_faults

    text = 'input { name: "input_ids" data_type: 32768 dims: [-1] }'
    assert any("32768" in fault for fault in config_faults(tmp_path / "decoder", seeds.write_artifact(tmp_path / "out").manifest, text))


def test_a_zip_that_swells(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps(seeds.LORA))
    with zipfile.ZipFile(source / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(CheckpointError, match="it would be 10000000 bytes"):
        convert(source, tmp_path / "out", None, None)


def test_a_tokenizer_of_a_million_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": i, "content": str(i)} for i in range(20_000)]}))
    with pytest.raises(ArtifactError, match="20000 added tokens; at most"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_work_that_is_bounded() -> None:
    assert bounded(lambda: [1, "a"], "it") == [1, "a"]
    with pytest.raises(ArtifactError, match=r"it failed \(ValueError: no\)"):
        bounded(lambda: (_ for _ in ()).throw(ValueError("no")), "it")
    with pytest.raises(ArtifactError, match=r"it failed \(MemoryError"):
        bounded(lambda: len("a" * 10**10), "it")
    with pytest.raises(ArtifactError, match=r"it was not done after 0\.2 s"):
        bounded(lambda: time.sleep(60), "it", 0.2)
    with pytest.raises(ArtifactError, match="ended its process"):
        bounded(lambda: os._exit(3), "it")


def test_an_error_is_one_line_that_a_terminal_can_show() -> None:
    assert one_line("a\n  b\x1b[2J\u202e") == "a b\\x1b[2J\\u202e"
    assert len(one_line("x" * 10**6 + " the remedy")) < 2100
    assert one_line("x" * 10**6 + " the remedy").endswith("the remedy")
    assert printable("fault 1\nfault\r2 é日") == "fault 1\nfault\\r2 é日"


def test_a_name_with_terminal_codes_is_shown_as_text(tmp_path: Path) -> None:
    out = seeds.write_artifact(tmp_path / "out").path
    edit(out / MANIFEST, blocks=[each | {"reason": "\x1b[2J"} for each in json.loads((out / MANIFEST).read_text())["blocks"]])
    result = CliRunner().invoke(main, ["explain", str(out)])
    assert "\\x1b[2J" in result.output and "\x1b" not in result.output
