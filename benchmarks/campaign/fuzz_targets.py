"""The fuzz targets: each reads one file of a stranger, as a command would, and only our own errors may come out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign import fuzz_mutate as mutate
from benchmarks.campaign import fuzz_seeds as seeds
from flora_export.artifact import GOLDEN, IR, MANIFEST, MODEL, Artifact, open_artifact
from flora_export.backends import backend_of
from flora_export.backends.triton.check import config_faults
from flora_export.backends.triton.config import CONFIG as PBTXT
from flora_export.backends.triton.config import Serving, Warmup, decoder_config, generate_config, read_serving
from flora_export.backends.triton.program.generation import RequestError, Settings, read_messages
from flora_export.backends.triton.repository import live
from flora_export.base_model import INDEX, SINGLE, load_base
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.convert import _unpickled as unpickled
from flora_export.errors import FloraExportError
from flora_export.explain import Explanation
from flora_export.inspection import inspect
from flora_export.methods import load_checkpoint
from flora_export.methods.reading import PICKLE
from flora_export.proof import check_ledger
from flora_export.stacks import read_stacks
from flora_export.verify.golden import recorded_prompts

REFUSALS = (FloraExportError, RequestError)


@dataclass(frozen=True)
class Reader:
    """What reads the bytes of one file, and sound examples of it."""

    read: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


@dataclass(frozen=True)
class Target:
    """`read` takes the bytes of one file. `share` is its part of all executions: more where reading is fast."""

    name: str
    read: Callable[[bytes], None]
    mutate: mutate.Mutate
    seeds: tuple[bytes, ...]
    share: int = 10


def make_targets(work: Path, names: Sequence[str] = ()) -> list[Target]:
    """The targets of these names, or all: each with a directory of its own under `work`, with the sound files beside its own."""
    config, header = mutate.mutate_json, mutate.mutate_safetensors
    plans: dict[str, tuple[Callable[[Path], Reader], mutate.Mutate, int]] = {
        "adapter_config": (lambda d: _adapter(d, CONFIG, seeds.FFBA, seeds.ffba_tensors()), config, 20),
        "lora_config": (lambda d: _adapter(d, CONFIG, seeds.LORA, seeds.lora_tensors(), METHODS), config, 25),
        "adapter_weights": (lambda d: _adapter(d, WEIGHTS, seeds.FFBA, seeds.ffba_tensors()), header, 12),
        "lora_weights": (lambda d: _adapter(d, WEIGHTS, seeds.LORA, seeds.lora_tensors()), header, 12),
        "base_config": (lambda d: _base(d, "config.json", (GPTQ, COMPRESSED)), config, 12),
        "base_weights": (lambda d: _base(d, SINGLE), header, 8),
        "base_index": (_index, config, 15),
        "manifest": (lambda d: _artifact(d, MANIFEST, "plain"), config, 8),
        "manifest_bank": (lambda d: _artifact(d, MANIFEST, "bank"), config, 8),
        "manifest_quantized": (lambda d: _artifact(d, MANIFEST, "quantized"), config, 8),
        "manifest_shards": (lambda d: _artifact(d, MANIFEST, "shards"), config, 6),
        "onnx": (lambda d: _artifact(d, MODEL, "plain"), mutate.mutate_onnx, 8),
        "openvino": (lambda d: _artifact(d, IR, "ir"), mutate.mutate_text, 8),
        "shards_index": (lambda d: _artifact(d, INDEX, "shards"), config, 6),
        "golden": (lambda d: _golden(d, "plain"), header, 12),
        "golden_bank": (lambda d: _golden(d, "bank"), header, 8),
        "request": (lambda _: Reader(_request, tuple(map(_of, REQUESTS))), config, 40),
        "pbtxt": (_repository, mutate.mutate_text, 6),
        "peft_config": (lambda d: _adapter(d, CONFIG, PEFT[0], seeds.ffba_tensors(), PEFT), config, 1),
        "pickle": (_pickle, mutate.mutate_zip, 4),
    }
    targets = []
    for name in names or plans:
        make, mutator, share = plans[name]
        (work / name).mkdir(parents=True)
        reader = make(work / name)
        targets.append(Target(name, reader.read, mutator, reader.seeds, share))
    return targets


REQUESTS = (
    {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "stop": ["a"],
        "stream": True,
        "chat": False,
        "adapter": "a",
    },
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
)
METHODS = (
    seeds.LORA | {"modules_to_save": ["model.norm"], "trainable_token_indices": {"embed_tokens": [1, 2]}, "bias": "all", "use_dora": True},
    {"peft_type": "DELORA", "r": 2, "target_modules": ["q_proj"], "delora_lambda": 15},
    {"peft_type": "DORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    {"peft_type": "LORA2", "r": 2, "lora_alpha": 4, "target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"peft_type": "MELORA", "r": [1, 1], "lora_alpha": [2, 2], "target_modules": ["q_proj"]},
    {"peft_type": "RESLORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "res_flag": 1, "pre_num": 1, "lora_num": 1},
)
PEFT = (
    {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"},
    {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {}},
    {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "target_modules": ["q_proj"], "auto_mapping": {"parent_library": "os"}},
)
GPTQ = seeds.BASE | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}}
COMPRESSED = seeds.BASE | {
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}}},
    }
}  # fmt: skip


def _of(content: object) -> bytes:
    return json.dumps(content).encode()


def _adapter(directory: Path, name: str, config: dict[str, Any], tensors: dict[str, Any], more: Sequence[Any] = ()) -> Reader:
    """`inspect`, and what `build` reads before it captures."""
    model = load_base(str(seeds.write_base(directory / "base")))
    adapter = seeds.write_adapter(directory / "adapter", config, tensors, model.path)
    assert model.shapes

    def read(data: bytes) -> None:
        (adapter / name).write_bytes(data)
        checkpoint = load_checkpoint(adapter, model)
        for tensor in checkpoint.tensors:
            checkpoint.tensor(tensor)
        found = inspect(adapter, str(model.path))
        _shown(found.to_text(), found.to_dict())

    return Reader(read, ((adapter / name).read_bytes(), *map(_of, more)))


def _base(directory: Path, name: str, more: Sequence[Any] = ()) -> Reader:
    """What `build` reads of a base model before it captures."""
    adapter = seeds.write_adapter(directory / "adapter", seeds.FFBA, seeds.ffba_tensors())
    path = directory / "base"
    if not path.exists():
        seeds.write_base(path)

    def read(data: bytes) -> None:
        (path / name).write_bytes(data)
        base = load_base(str(path))
        facts = (base.width, base.layers, base.context, base.vocabulary, base.tied, base.shapes, base.digests)
        assert facts
        for tensor in base.tensors:
            base.read(tensor)
        load_checkpoint(adapter, base)

    return Reader(read, ((path / name).read_bytes(), *map(_of, more)))


def _index(directory: Path) -> Reader:
    shard = "model-00001-of-00001.safetensors"
    base = seeds.write_base(directory / "base")
    (base / SINGLE).rename(base / shard)
    (base / INDEX).write_bytes(_of({"metadata": {}, "weight_map": dict.fromkeys(seeds.base_tensors(), shard)}))
    return _base(directory, INDEX)


def _artifact(directory: Path, name: str, kind: str) -> Reader:
    """`explain OUT`, and what else is read of an artifact without its sources."""
    path = seeds.ARTIFACTS[kind](directory / "out").path

    def read(data: bytes) -> None:
        (path / name).write_bytes(data)
        artifact = open_artifact(path)
        manifest, report = artifact.manifest, check_ledger(artifact)
        details, lines = backend_of(artifact).explain(artifact)
        found = (manifest.blocks, manifest.changes, manifest.operators, manifest.ledger, report, manifest.align, manifest.bank)
        explained = Explanation(*found, details, lines)
        _shown(explained.to_text(), explained.to_dict())
        for step in (recorded_prompts, read_stacks, _configurations):
            with contextlib.suppress(*REFUSALS):
                step(artifact)

    return Reader(read, ((path / name).read_bytes(),))


def _configurations(artifact: Artifact) -> list[str]:
    """What `triton` writes for it."""
    nothing, manifest = Warmup({}, {}), artifact.manifest
    return [decoder_config(manifest, 1, Serving(), nothing), generate_config(manifest, 1, Serving(), nothing, {"model.py": "0" * 64})]


def _shown(text: str, content: object) -> None:
    """What a command prints: it must be text, and JSON."""
    text.encode()
    json.dumps(content).encode()


def _golden(directory: Path, kind: str) -> Reader:
    artifact = seeds.ARTIFACTS[kind](directory / "out")
    file = artifact.path / GOLDEN

    def read(data: bytes) -> None:
        file.write_bytes(data)
        recorded_prompts(artifact)

    return Reader(read, (file.read_bytes(),))


def _request(data: bytes) -> None:
    """Parameters, or messages, of a request to the server. Parameters that are no JSON never get so far."""
    text = data.decode("utf-8", "replace")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if isinstance(given, dict):
        Settings.read(given)
    else:
        assert all({*message} == {"role", "content"} for message in read_messages(text, 10_000))


def _repository(directory: Path) -> Reader:
    """A Triton repository's configurations, as `triton` and `publish-adapter` read what is live."""
    artifact = seeds.ARTIFACTS["plain"](directory / "out")
    for model in ("decoder", "generate"):
        (directory / model).mkdir(parents=True)

    def read(data: bytes) -> None:
        for model in ("decoder", "generate"):
            (directory / model / PBTXT).write_bytes(data)
        for step in (live, read_serving, lambda repo: config_faults(repo / "decoder", artifact.manifest)):
            with contextlib.suppress(*REFUSALS):
                step(directory)

    return Reader(read, tuple(text.encode() for text in _configurations(artifact)))


def _pickle(directory: Path) -> Reader:
    """`convert`, as far as it reads a pickle."""
    import torch

    file = directory / PICKLE
    torch.save({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.zeros(4, 2, dtype=torch.float16)}, file)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for tensor in unpickled(file).values():
            assert tensor.nbytes < 2**30

    return Reader(read, (file.read_bytes(),))
