"""Hostile adapters and base models: configurations, weights, and what stands in the place of a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.hostile_directory import (
    DEEP,
    PATHS,
    PLACES,
    Case,
    Sound,
    adapter_case,
    base_case,
    code,
    copy,
    edit_json,
    paths,
    replaced,
)
from flora_export.base_model import INDEX, SINGLE
from flora_export.checkpoint import CONFIG, WEIGHTS


def cases() -> Iterator[Case]:
    yield from _adapters()
    yield from _weights()
    yield from _bases()


def _adapters() -> Iterator[Case]:
    values: dict[str, dict[str, Any]] = {
        "r=10^12": {"r": 10**12}, "r=10^400": {"r": 10**400}, "r=-1": {"r": -1}, "alpha NaN": {"alpha": float("nan")},
        "alpha Infinity": {"alpha": float("inf")}, "gain 10^400": {"gated_gain": 10**400}, "r a list": {"r": [4] * 1000},
        "a method's name that is code": {"peft_type": "__import__('os').system('id')"},
        "a method of 10^6 letters": {"peft_type": "A" * 10**6},
        "half a character": {"peft_type": "\ud800"}, "terminal codes": {"peft_type": "\x1b[2J\nerror: \x07"},
        "a pattern that backtracks": {"target_modules": "(a+)+(a+)+$"},
        "patterns in thousands": {"rank_pattern": {f".*{i}.*.*.*x": 1 for i in range(3000)}},
        "a pattern of groups": {"target_modules": "((((((((((a|b)|c)|d)|e)|f)|g)|h)|i)|j)|k)*"},
        "layers 10^6": {"layers_to_transform": list(range(10**6))},
        "rank pattern deep": {"rank_pattern": {"(" * 400 + ")" * 400: 2}}, "version 10^30": {"ffba_version": 10**30},
        "saved modules": {"modules_to_save": ["../../secret"]}, "format codes": {"target_modules": ["{0.__class__}", "%n%n"]},
    }  # fmt: skip
    for name, changes in values.items():

        def edit(adapter: Path, _: Sound, changes: dict[str, Any] = changes) -> None:
            edit_json(adapter / CONFIG, **changes)

        codes = (0, 2) if name in ("patterns in thousands", "layers 10^6") else (2,)  # large, and true
        yield adapter_case(f"adapter {name}", edit, "inspect", codes)
        yield adapter_case(f"adapter {name}: build", edit, "build", codes)
    peft: dict[str, dict[str, Any]] = {
        "OFT that counts for ever": {"peft_type": "OFT", "r": 0, "oft_block_size": -(10**30), "target_modules": ["q_proj"]},
        "VERA of 10^9 ranks": {"peft_type": "VERA", "r": 10**9, "target_modules": ["q_proj"]},
        "LOHA of 10^9 ranks": {"peft_type": "LOHA", "r": 10**9, "target_modules": ["q_proj"]},
        "IA3 that maps itself": {"peft_type": "IA3", "target_modules": ["q_proj"], "auto_mapping": {"parent_library": "antigravity"}},
        "prompt of 10^12 tokens": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**12},
    }
    for name, config in peft.items():
        yield adapter_case(f"adapter {name}", lambda adapter, _, c=config: (adapter / CONFIG).write_text(json.dumps(c)))
    texts = {
        "100,000 levels": DEEP, "levels of keys": '{"a":' * 100_000 + "1" + "}" * 100_000, "not UTF-8": b"\xff\xfe{}",
        "nothing": "", "null": "null",
        "NUL": "\0" * 1000, "1e400": '{"peft_type": "FFBA", "r": 1e400}', "digits": '{"r": ' + "9" * 10**6 + "}",
        "a key twice": '{"peft_type": "FFBA", "peft_type": "LORA", "r": 4, "r": -4}',
        "keys in millions": json.dumps(dict.fromkeys(map(str, range(10**6)), 0)),
        "70 MiB": " " * (70 << 20) + "{}",
    }  # fmt: skip
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        yield adapter_case(f"adapter config: {name}", lambda adapter, _, content=content: (adapter / CONFIG).write_bytes(content))
    for name, base in (
        ("a device", "/dev"),
        ("the root", "/"),
        ("a path", "../../.."),
        ("a hub name", "nobody/nothing"),
        ("NUL", "a\0/b"),
        ("long", "x/" * 3000),
    ):

        def make(directory: Path, sound: Sound, base: str = base) -> list[str]:
            adapter = copy(sound.adapter, directory / "adapter")
            edit_json(adapter / CONFIG, base_model_name_or_path=base)
            return ["build", str(adapter), "--backend", "onnxruntime", "--output", str(directory / "out")]

        yield Case(f"adapter names as its base {name}", make)


def _weights() -> Iterator[Case]:
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}

    def headed(header: object) -> Callable[[Path, Sound], object]:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        return lambda file, _: file.write_bytes(struct.pack("<Q", len(text)) + text)

    contents: dict[str, Callable[[Path, Sound], object]] = {
        "a header of 2^63": lambda file, _: file.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "a header of 2^64 - 1": lambda file, _: file.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}"),
        "10^6 tensors": headed(many),
        "100,000 levels": headed(DEEP),
        "a shape of 10^12": headed({"t": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}),
        "a shape that overflows": headed({"t": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        "offsets that overflow": headed({"t": {"dtype": "F32", "shape": [1], "data_offsets": [2**64 - 4, 2**64]}}),
        "offsets backwards": headed({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
        "a name that is a path": headed({"../../secret": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "a name with terminal codes": headed({"\x1b[2J\nerror: ": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "a pickle": lambda file, sound: file.write_bytes(code(sound)),
    }  # fmt: skip
    for name, how in (contents | PLACES).items():
        yield adapter_case(f"weights: {name}", replaced(WEIGHTS, how))
        yield base_case(f"base weights: {name}", replaced(SINGLE, how), "inspect", (0, 2) if name.startswith("a name") else (2,))
    for name, how in PLACES.items():
        yield adapter_case(f"adapter config is {name}", replaced(CONFIG, how))
        yield base_case(f"base config is {name}", replaced("config.json", how))


def _bases() -> Iterator[Case]:
    for name in PATHS:

        def index(base: Path, sound: Sound, name: str = name) -> None:
            (base / SINGLE).rename(base / "model-00001-of-00001.safetensors")
            (base / INDEX).write_text(json.dumps({"weight_map": {"a": paths(sound)[name], "b": "model-00001-of-00001.safetensors"}}))

        yield base_case(f"base index: {name}", index)
    values: dict[str, dict[str, Any]] = {
        "10^12 layers": {"num_hidden_layers": 10**12}, "width 10^12": {"hidden_size": 10**12}, "vocabulary 10^12": {"vocab_size": 10**12},
        "vocabulary -1": {"vocab_size": -1}, "no heads": {"num_attention_heads": 0}, "heads 10^12": {"num_attention_heads": 10**12},
        "MLP of 10^12": {"intermediate_size": 10**12}, "context 10^30": {"max_position_embeddings": 10**30},
        "type is a path": {"model_type": "../../secret"},
        "type is unknown": {"model_type": "harmless"}, "types are a list": {"model_type": ["llama"]},
        "theta NaN": {"rope_theta": float("nan")},
        "heads as text": {"num_attention_heads": "__class__"}, "head size 10^9": {"head_dim": 10**9},
        "rope deep": {"rope_parameters": {"rope_type": "a" * 10**6, "factor": float("inf")}},
        "code of its own": {
            "auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}, "model_type": "x", "trust_remote_code": True
        },
        "code of another": {"auto_map": {"AutoModelForCausalLM": "nobody/nothing--modeling_x.X"}, "model_type": "x"},
        "quantized by nobody": {"quantization_config": {"quant_method": "../secret"}},
        "quantized deep": {"quantization_config": {"quant_method": [[]]}},
        "groups of 10^12": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 10**12}},
    }  # fmt: skip
    for name, changes in values.items():

        def edit(base: Path, sound: Sound, changes: dict[str, Any] = changes) -> None:
            edit_json(base / "config.json", **changes)
            (base / "modeling_x.py").write_text(f"open({str(sound.ran)!r}, 'w')")

        yield base_case(f"base {name}: build", edit, "build", (0, 2) if name == "theta NaN" else (2,))
