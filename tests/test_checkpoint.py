"""Bad checkpoints and bases: one clear error each, before anything large is read."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flora_export.base_model import load_base
from flora_export.checkpoint import Checkpoint
from flora_export.errors import CheckpointError
from flora_export.methods import load_base_of, load_checkpoint
from tests.families import LAYERS, WIDTH, make_adapter

KEY = "base_model.model.model.layers.0.mlp.ffba_A.weight"


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture
def load(base: Path) -> Callable[[Path], Checkpoint]:
    return lambda path: load_checkpoint(path, load_base(str(base)))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_the_gain_of_gated_branches(base: Path, tmp_path: Path, load: Callable[[Path], Checkpoint]) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", gated_gain=3.0)
    assert [branch.scale for branch in load(adapter).branches] == [2.0, 6.0] * LAYERS


def test_a_good_one(adapter: Path, load: Callable[[Path], Checkpoint]) -> None:
    checkpoint = load(adapter)
    assert [(b.block, b.kind, b.activation, b.rank, b.scale) for b in checkpoint.branches] == [
        (f"model.layers.{i}.{name}", kind, activation, 4, 2.0)
        for i in range(LAYERS)
        for name, kind, activation in (("self_attn", "attention", "identity"), ("mlp", "mlp", "gated"))
    ]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert set(checkpoint.tensors) == tensors.keys()
    for branch in checkpoint.branches:
        for matrix in branch.matrices:
            values = checkpoint.matrix(branch, matrix)
            np.testing.assert_array_equal(values, tensors[f"base_model.model.{branch.block}.ffba_{matrix}.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(copy: Path, load: Callable[[Path], Checkpoint], dtype: torch.dtype) -> None:
    edit_tensors(copy, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    branch = load(copy).branches[0]
    expected = load_file(copy / "adapter_model.safetensors")[f"base_model.model.{branch.block}.ffba_A.weight"].float().numpy()
    np.testing.assert_array_equal(load(copy).matrix(branch, "A"), expected)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING', which .* changes no weight"),
    ({"peft_type": "IA3"}, "PEFT cannot make this IA3"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"r": WIDTH + 1}, f"rank {WIDTH + 1} of model.layers.0.self_attn is above the base model's width {WIDTH}"),
    ({"rank_pattern": {"mlp": 0}}, "rank_pattern"),
    ({"rank_pattern": {"(": 3}}, "no regular expression"),
    ({"alpha": float("nan")}, "alpha is nan"),
    ({"alpha": "8"}, "alpha is '8'"),
    ({"gated_gain": None}, "gated_gain is None"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"attn_activation": "gated"}, "attn_activation is 'gated'"),
    ({"mlp_activation": "swish"}, "mlp_activation is 'swish', but must be one of identity"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": "(.|.|.)*!"}, "may repeat no group"),
    ({"rank_pattern": {"a{99999999999999999999}": 3}}, "no regular expression"),
    ({"rank_pattern": {".*a.*b.*c.*d.*e": 3}}, "at most 4"),
    ({"alpha": 10**400}, "alpha is"),
    ({"dropout": "much"}, "dropout is 'much'"),
    ({"target_modules": ["q_proj"]}, "selects no block"),
    ({"target_modules": "("}, "no regular expression"),
    ({"layers_to_transform": "all"}, "layers_to_transform"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save.*only FFBA branches are exported"),
    # the file no longer fits what the configuration promises
    ({"r": 5}, r"self_attn A is \(4, 64\), but the base model and its rank need \(5, 64\)"),
    ({"mlp_activation": "relu"}, "2 tensors that the configuration.*first .*ffba_G"),
    ({"target_modules": ["mlp"]}, "tensors that the configuration.*self_attn"),
    ({"layers_to_transform": [0]}, "tensors that the configuration.*layers.1"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_bad_configurations(copy: Path, load: Callable[[Path], Checkpoint], changes: dict[str, Any], message: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


TENSORS: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda t: t.pop(KEY), "layers.0.mlp A is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "1 tensors that the configuration.*first extra"),
    (lambda t: t.update({KEY: t[KEY][:, :-1].clone()}), r"layers.0.mlp A is \(4, 63\).*need \(4, 64\).*another base model"),
    (lambda t: t.update({KEY: t[KEY].double()}), "mlp A is F64, but must be one of F32, F16, BF16"),
    (lambda t: t[KEY].__setitem__((1, 2), float("nan")), f"{KEY} holds 1 NaN or infinite"),
    (lambda t: t[KEY].__setitem__((1, 2), float("inf")), f"{KEY} holds 1 NaN or infinite"),
    (lambda t: t.update({KEY.replace("model.layers", "other.layers"): t.pop(KEY)}), "more than one list of layers"),
]


@pytest.mark.parametrize(("edit", "message"), TENSORS, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_tensors(copy: Path, load: Callable[[Path], Checkpoint], edit: Callable[..., object], message: str) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def damage(data: bytes, kind: str) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    return {
        "truncated data": data[:-4],
        "truncated header": data[: 8 + size // 2],
        "empty": b"",
        "oversized header": struct.pack("<Q", 2**40) + data[8:],
        "header of zero": struct.pack("<Q", 0) + data[8:],
        "not JSON": data[:8] + b"{" * size + data[8 + size :],
        "trailing bytes": data + b"\0" * 64,
    }[kind]


DAMAGES = ["truncated data", "truncated header", "empty", "oversized header", "header of zero", "not JSON", "trailing bytes"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_safetensors(copy: Path, load: Callable[[Path], Checkpoint], kind: str) -> None:
    file = copy / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes(), kind))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(copy)


def test_pickle_is_refused_unread(copy: Path, load: Callable[[Path], Checkpoint]) -> None:
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle.*flora-export convert"):
        load(copy)


def test_missing_files(copy: Path, load: Callable[[Path], Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such adapter directory"):
        load(tmp_path / "nowhere")
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load(copy)
    (copy / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(copy)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load(copy)


def test_wrong_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    shallow = Path(shutil.copytree(base, tmp_path / "base"))
    edit = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(edit | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"a base model of 1 layers.*first .*layers\.1"):
        load_checkpoint(adapter, load_base(str(shallow)))
    (shallow / "config.json").write_text(json.dumps(edit | {"hidden_size": 96}))
    with pytest.raises(CheckpointError, match=r"self_attn A is \(4, 64\), but .* \(4, 96\)\. Trained on another base model"):
        load_checkpoint(adapter, load_base(str(shallow)))


def test_another_method_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.FourierFTConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="peft_type is 'FOURIERFT', which draws what it multiplies by from a seed"):
        load_checkpoint(tmp_path, load_base(str(base)))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["mlp"]},
        {"target_modules": r".*\.layers\.1\.(mlp|self_attn)"},
        {"layers_to_transform": 1},
        {"exclude_modules": ["layers.0.mlp"]},
        {"rank_pattern": {r"1\.mlp": 7, "mlp": 3}},
        {"rank_pattern": {}},
    ],
    ids=str,
)
def test_our_reading_of_a_configuration_is_pefts(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """PEFT decided what to save; we promise the same tensors from the configuration alone."""
    checkpoint = load_checkpoint(make_adapter(base, tmp_path, **config), load_base(str(base)))
    assert set(checkpoint.tensors) == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_bases(base: Path, tmp_path: Path) -> None:
    assert load_base(str(base)).width == WIDTH
    with pytest.raises(CheckpointError, match=r"no such directory, and not a hub name.*--base"):
        load_base("/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"not in the local hub cache.*--base DIR"):
        load_base("nobody/nothing")
    for name in ("~nobody-of-that-name/model", "a" * 300):
        with pytest.raises(CheckpointError, match="no such directory, and not a hub name"):
            load_base(name)
    for name in ("nobody/nothing@", "nobody/nothing@../../x", "nobody/nothing@-x"):
        with pytest.raises(CheckpointError, match="is no revision"):
            load_base(name)
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_base(str(copy))
    file.rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing\. It has pytorch_model\.bin; only safetensors"):
        load_base(str(copy))
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="leaves the model's directory"):
        load_base(str(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "model.safetensors.index.json").unlink()
    (copy / "pytorch_model.bin").rename(file)
    file.write_bytes(data)
    for change, message in (
        ({"num_hidden_layers": 10**9}, "no model has more than 1000"),
        ({"max_position_embeddings": 16}, "at least 32"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": None}, "hidden_size is None"),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_base(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text("null")
    with pytest.raises(CheckpointError, match="generation configuration"):
        load_base(str(copy))
    (copy / "model.safetensors.index.json").write_text("{}")
    (copy / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and"):
        load_base(str(copy))


def test_the_base_of_an_adapter_is_at_the_revision_that_it_names(base: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT loads it: another revision is another model."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    edit_config(copy, base_model_name_or_path="owner/model", revision="refs/pr/1")
    assert load_base_of(copy, None).name == "owner/model@refs/pr/1"
    edit_config(copy, revision=None)
    assert load_base_of(copy, None).name == load_base_of(copy, "owner/model").name == "owner/model"
    assert asked == [("owner/model", "refs/pr/1"), ("owner/model", None), ("owner/model", None)]
    edit_config(copy, base_model_name_or_path=str(base), revision="main")
    assert load_base_of(copy, None).path == base
    edit_config(copy, base_model_name_or_path="owner/model", revision="../..")
    with pytest.raises(CheckpointError, match=r"owner/model: '\.\./\.\.' is no revision"):
        load_base_of(copy, None)
