"""What is wrong with a config.pbtxt, found without a server: what the schema forbids, and the sizes and names that it lets through."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flora_export.backends.triton.config import (
    CONFIG,
    DECODER,
    GENERATE_OUTPUTS,
    MAIN,
    RUNTIMES,
    describe,
    generate_inputs,
    is_scalar,
    parse,
)
from flora_export.manifest import Manifest

BYTES = {"TYPE_FP32": 4, "TYPE_FP16": 2, "TYPE_BF16": 2, "TYPE_INT64": 8, "TYPE_INT32": 4, "TYPE_BOOL": 1}


def config_faults(model: Path, manifest: Manifest, text: str | None = None) -> list[str]:
    """Faults of a model's configuration, a line each.

    Args:
        model: the directory of the model in its repository.
        manifest: of the version that the configuration makes live.
        text: check this instead of the file.
    """
    file = model / CONFIG
    try:
        config = parse(file.read_text(encoding="utf-8") if text is None else text)
    except (OSError, ValueError) as error:
        return [f"{model.name}/{CONFIG}: {error}"]
    faults = _sizes(config) + _places(config, model) + _tensors(config, manifest, model.name) + _warmup(config, model)
    return [f"{model.name}/{CONFIG}: {fault}" for fault in faults]


def _sizes(config: Any) -> list[str]:
    """Numbers that the schema lets through."""
    faults = []
    if config.max_batch_size < 0:
        faults.append(f"max_batch_size is {config.max_batch_size}, but must be 0 or more")
    for tensor in (*config.input, *config.output):
        wrong = [d for d in tensor.dims if d != -1 and d < 1]
        if wrong or not tensor.dims:
            faults.append(f"{tensor.name} has dims {list(tensor.dims)}: each must be at least 1, or -1 for any")
    names = [tensor.name for tensor in (*config.input, *config.output)]
    faults += [f"{name} is there {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    faults += [f"instance_group has count {g.count}, but must have at least 1" for g in config.instance_group if g.count < 1]
    if not config.instance_group:
        faults.append("there is no instance_group")
    preferred = [n for n in config.dynamic_batching.preferred_batch_size if not 1 <= n <= config.max_batch_size]
    if preferred:
        faults.append(f"preferred_batch_size {preferred} is not between 1 and max_batch_size {config.max_batch_size}")
    return faults


def _places(config: Any, model: Path) -> list[str]:
    """Names of the model, its backend, its live version and its file."""
    faults = []
    backend, file = "python", MAIN
    if config.name != model.name:
        faults.append(f"name is {config.name!r}, but its directory is {model.name!r}")
    if model.name == DECODER:
        known = dict(RUNTIMES.values())
        backend, file = config.backend if config.backend in known else "/".join(known), known.get(config.backend, "")
    if config.backend != backend:
        faults.append(f"backend is {config.backend!r}, but must be {backend}")
    versions = list(config.version_policy.specific.versions)
    if len(versions) != 1:
        faults.append(f"version_policy names the versions {versions}, but must name one: the live one")
    for version in versions:
        if file and not (model / str(version) / file).is_file():
            faults.append(f"version_policy names version {version}, but there is no {model.name}/{version}/{file}")
    if config.default_model_filename != file:
        faults.append(f"default_model_filename is {config.default_model_filename!r}, but must be {file!r}")
    return faults


def _tensors(config: Any, manifest: Manifest, model: str) -> list[str]:
    """Inputs and outputs against what the live version takes and gives."""
    decoder = model == DECODER
    faults = []
    for side in ("input", "output"):
        if decoder:
            expected = {name: (kind, dims) for name, kind, dims in map(describe, getattr(manifest, f"{side}s"))}
        else:
            rows = generate_inputs(manifest) if side == "input" else GENERATE_OUTPUTS
            expected = {row[0]: (row[1], row[2]) for row in rows}
        found = {tensor.name: (_type_name(tensor), list(tensor.dims)) for tensor in getattr(config, side)}
        faults += [f"{side} {name} is missing" for name in expected.keys() - found.keys()]
        faults += [f"{side} {name} is none of the model's" for name in found.keys() - expected.keys()]
        for name in expected.keys() & found.keys():
            if found[name] != expected[name]:
                faults.append(
                    f"{side} {name} is {found[name][0]} {found[name][1]}, but the model has {expected[name][0]} {expected[name][1]}"
                )
        scalars = {tensor.name for tensor in getattr(manifest, f"{side}s") if is_scalar(tensor)} if decoder else set()
        for tensor in getattr(config, side):
            if (tensor.HasField("reshape"), list(tensor.reshape.shape)) != (tensor.name in scalars, []):
                faults.append(f"{side} {tensor.name} must have {'reshape { shape: [] }' if tensor.name in scalars else 'no reshape'}")
    if decoder and config.max_batch_size < 1:
        faults.append("max_batch_size is 0, but the graph's first dimension is the batch")
    return sorted(faults)


def _warmup(config: Any, model: Path) -> list[str]:
    """Warm-up requests: inputs that the model has and needs, of their types and ranks, from files of the right size."""
    faults = []
    inputs = {tensor.name: tensor for tensor in config.input}
    needed = {tensor.name for tensor in config.input if not tensor.optional}
    for warmup in config.model_warmup:
        missing, unknown = needed - warmup.inputs.keys(), warmup.inputs.keys() - inputs.keys()
        if missing or unknown:
            faults.append(
                f"model_warmup {warmup.name} lacks the inputs {sorted(missing)}, and has {sorted(unknown)} that the model has not"
            )
        for name in warmup.inputs.keys() & inputs.keys():
            given, tensor = warmup.inputs[name], inputs[name]
            fits = len(given.dims) == len(tensor.dims) and all(
                g >= 0 and t in (-1, g) for g, t in zip(given.dims, tensor.dims, strict=True)
            )
            if not fits or given.data_type != tensor.data_type:
                faults.append(f"model_warmup {warmup.name}: {name} has other dims or another type than the input")
            elif given.input_data_file:
                file = model / "warmup" / given.input_data_file
                size = math.prod(given.dims) * BYTES.get(_type_name(tensor), 0)
                if not _holds(file, size):
                    faults.append(f"model_warmup {warmup.name}: {name} wants {size or 'its'} bytes in warmup/{file.name}")
    return faults


def _holds(file: Path, size: int) -> bool:
    """Whether a file can be read and has that size; without a size, whether it is a text with its length before it."""
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        return False
    return bool(content) and len(content) == (size or 4 + int.from_bytes(content[:4], "little"))


def _type_name(tensor: Any) -> str:
    known = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return str(known[tensor.data_type].name) if tensor.data_type in known else str(tensor.data_type)  # a file may have any number
