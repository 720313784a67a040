"""config.pbtxt: written for both models of a repository, and checked without a server.

`decoder` takes what the graph takes, the KV cache with it, and keeps nothing. Its first dimension is the batch, so that the server may
join requests of equal shapes. `generate` does its own scheduling. The live version is named in `version_policy`: a version goes live, and
another comes back, by one replaced file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.errors import ArtifactError, BackendError
from flora_export.manifest import Manifest, Tensor
from flora_export.stacks import matrices_of

DECODER, GENERATE = "decoder", "generate"
CONFIG = "config.pbtxt"
MAIN = "model.py"  # of the program of `generate`: what the server runs
HASH = "sha256:"  # begins a parameter of `generate` that has the hash of a file of its program
THREADS = "intra_op_thread_count"  # a parameter of `decoder` that Triton's ONNX Runtime takes
FORMER = "former_version"  # a parameter of `decoder`: what was live before; Triton has no use for it
TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32"}
# What a decoder's files are called, and which of Triton's backends runs them. TensorRT's form has not been run by us.
RUNTIMES = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.engine")}
KINDS = {"cpu": "KIND_CPU"}  # of instances; every other target is a GPU

# name, type, dims, optional
GENERATE_INPUTS = (
    ("text_input", "TYPE_STRING", [1], True),
    ("messages", "TYPE_STRING", [1], True),
    ("max_tokens", "TYPE_INT32", [1], True),
    ("temperature", "TYPE_FP32", [1], True),
    ("top_p", "TYPE_FP32", [1], True),
    ("top_k", "TYPE_INT32", [1], True),
    ("seed", "TYPE_INT32", [1], True),
    ("stop", "TYPE_STRING", [-1], True),
    ("stream", "TYPE_BOOL", [1], True),
    ("chat", "TYPE_BOOL", [1], True),
)
ADAPTER_INPUT = ("adapter", "TYPE_STRING", [1], True)  # of a bank; optional, so that the model itself says which names there are
GENERATE_OUTPUTS = (
    ("text_output", "TYPE_STRING", [1]),
    ("finish_reason", "TYPE_STRING", [1]),
    ("prompt_tokens", "TYPE_INT32", [1]),
    ("new_tokens", "TYPE_INT32", [1]),
)


@dataclass(frozen=True)
class Serving:
    """How a repository is served. `threads` are those of one operator, 0: the runtime's choice; `concurrent` requests of one instance."""

    instances: int = 1
    max_batch: int = 8
    concurrent: int = 8
    threads: int = 0
    max_queue: int = 256
    check_files: bool = True  # against the manifest, whenever `generate` is loaded
    max_tokens: int = 0  # that a request may ask for; 0: what the context leaves
    max_prompt: int = 0  # tokens of its prompt; 0: what the context takes


@dataclass(frozen=True)
class Warmup:
    """A first request that the server sends itself: files in the model's directory `warmup`, by input, and their dimensions."""

    files: dict[str, tuple[str, list[int]]]
    zeros: dict[str, list[int]]


def decoder_config(manifest: Manifest, version: int, serving: Serving, warmup: Warmup, former: int | None = None) -> str:
    """config.pbtxt of `decoder`; `former` is the version that was live before it.

    Raises BackendError where Triton has no such backend or type, or cannot load such an engine.
    """
    if manifest.backend not in RUNTIMES:
        raise BackendError(f"a Triton repository cannot serve an artifact of backend {manifest.backend}; it serves {', '.join(RUNTIMES)}")
    backend, file = RUNTIMES[manifest.backend]
    batch, profiles = serving.max_batch, ""
    if manifest.backend == "tensorrt":
        if manifest.engine["flavour"] == "rtx":
            raise BackendError(
                "a Triton repository cannot serve an engine of TensorRT-RTX: Triton's tensorrt backend loads engines of the full TensorRT. "
                "Build one with --trt-flavor tensorrt."
            )
        if matrices_of(manifest):
            raise BackendError(
                "a Triton repository cannot serve an engine whose adapters are inputs, which no request gives. Build the bank with "
                "--bank columns, or for onnxruntime."
            )
        batch = min(batch, manifest.engine["profiles"]["decode"]["batch"][2])
        profiles = ' profile: ["0", "1"]'  # prefill and decode; without them the backend loads the first alone
    lines = [f'name: "{DECODER}"', f'backend: "{backend}"', f'default_model_filename: "{file}"', f"max_batch_size: {batch}"]
    lines += [_tensor("input", *describe(tensor), scalar=is_scalar(tensor)) for tensor in manifest.inputs]
    lines += [_tensor("output", *describe(tensor)) for tensor in manifest.outputs]
    lines += _common(version, serving.instances, KINDS.get(manifest.target, "KIND_GPU") + profiles)
    # Only requests of equal shapes are joined. No delay: a request is never kept waiting for company.
    lines.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: 0\n{_queue_policy(serving.max_queue)}}}")
    if serving.threads and backend == "onnxruntime":
        lines.append(_parameter(THREADS, serving.threads))
    if former is not None:
        lines.append(_parameter(FORMER, former))
    lines.append(_warmup(warmup, {tensor.name: describe(tensor)[1] for tensor in manifest.inputs}))
    return "\n".join(lines) + "\n"


def generate_config(manifest: Manifest, version: int, serving: Serving, warmup: Warmup, program: Mapping[str, str]) -> str:
    """config.pbtxt of `generate`. `program` has the SHA-256 of its files that the manifest does not know, by name."""
    lines = [f'name: "{GENERATE}"', 'backend: "python"', f'default_model_filename: "{MAIN}"', "max_batch_size: 0"]
    lines.append("model_transaction_policy { decoupled: true }")
    inputs = generate_inputs(manifest)
    lines += [_tensor("input", name, kind, dims, optional=optional) for name, kind, dims, optional in inputs]
    lines += [_tensor("output", name, kind, dims) for name, kind, dims in GENERATE_OUTPUTS]
    lines += _common(version, serving.instances, KINDS.get(manifest.target, "KIND_GPU"))
    lines.append(f"dynamic_batching {{\n{_queue_policy(serving.max_queue)}}}")
    lines.append(_parameter("concurrent_requests", serving.concurrent))
    lines.append(_parameter("threads", serving.threads))
    lines.append(_parameter("check_files", "true" if serving.check_files else "false"))
    lines.append(_parameter("max_tokens", serving.max_tokens))
    lines.append(_parameter("max_prompt", serving.max_prompt))
    lines += [_parameter(f"{HASH}{name}", value) for name, value in program.items()]
    lines.append(_warmup(warmup, {name: kind for name, kind, *_ in inputs}))
    return "\n".join(lines) + "\n"


def generate_inputs(manifest: Manifest) -> tuple[tuple[str, str, list[int], bool], ...]:
    """The inputs of `generate`; a bank's takes an adapter's name as well."""
    return GENERATE_INPUTS if manifest.bank is None else (*GENERATE_INPUTS, ADAPTER_INPUT)


def describe(tensor: Tensor) -> tuple[str, str, list[int]]:
    """A graph's tensor as Triton's clients see it: name, type, dimensions without the batch; -1 is any. Raises BackendError."""
    if tensor.dtype not in TYPES:
        raise BackendError(f"{tensor.name} has type {tensor.dtype}, which a Triton repository cannot serve; it can {', '.join(TYPES)}")
    return tensor.name, TYPES[tensor.dtype], [1] if is_scalar(tensor) else [d if isinstance(d, int) else -1 for d in tensor.shape[1:]]


def is_scalar(tensor: Tensor) -> bool:
    """Whether a graph's tensor is one number a row, [batch]: Triton has no dims of none, so clients send [batch, 1], which it reshapes."""
    return len(tensor.shape) == 1


def _common(version: int, instances: int, kind: str) -> list[str]:
    return [f"instance_group {{ count: {instances} kind: {kind} }}", f"version_policy {{ specific {{ versions: {version} }} }}"]


def _queue_policy(most: int) -> str:
    return f"  default_queue_policy {{ max_queue_size: {most} }}\n"


def _parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def _warmup(warmup: Warmup, types: dict[str, str]) -> str:
    rows = [(name, dims, f'input_data_file: "{file}"') for name, (file, dims) in warmup.files.items()]
    rows += [(name, dims, "zero_data: true") for name, dims in warmup.zeros.items()]
    inputs = [f'  inputs {{ key: "{name}" value {{ data_type: {types[name]} dims: {dims} {data} }} }}' for name, dims, data in rows]
    return "\n".join(["model_warmup {", '  name: "golden"', "  batch_size: 1", *inputs, "}"])


def _tensor(side: str, name: str, kind: str, dims: Sequence[int], *, optional: bool = False, scalar: bool = False) -> str:
    more = (" optional: true" if optional else "") + (" reshape { shape: [] }" if scalar else "")
    return f'{side} {{ name: "{name}" data_type: {kind} dims: {list(dims)}{more} }}'


def parse(text: str) -> Any:
    """Triton's own message ModelConfig. Raises ValueError where the text does not fit its schema, BackendError without tritonclient."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise BackendError(
            f"config.pbtxt is checked with tritonclient, which is not there ({error}): pip install 'flora-export[triton]'"
        ) from error
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"does not fit Triton's schema: {error}") from error


def read_serving(repo: Path) -> Serving:
    """How a repository is served now, as its configurations say it; where nothing is published yet, the defaults.

    Raises ArtifactError where they do not say it.
    """
    if not (repo / DECODER / CONFIG).exists():
        return Serving()
    known: dict[str, Any] = {}
    try:
        decoder = parse((repo / DECODER / CONFIG).read_text(encoding="utf-8"))
        if THREADS in decoder.parameters:
            known["threads"] = int(decoder.parameters[THREADS].string_value)
        if (repo / GENERATE / CONFIG).is_file():
            parameters = parse((repo / GENERATE / CONFIG).read_text(encoding="utf-8")).parameters
            known["concurrent"] = int(parameters["concurrent_requests"].string_value)
            known["threads"] = int(parameters["threads"].string_value)
            known["check_files"] = parameters["check_files"].string_value == "true"
            for limit in ("max_tokens", "max_prompt"):  # versions of before they were have none
                known[limit] = int(parameters[limit].string_value) if limit in parameters else 0
        return Serving(
            instances=decoder.instance_group[0].count,
            max_batch=decoder.max_batch_size,
            max_queue=decoder.dynamic_batching.default_queue_policy.max_queue_size,
            **known,
        )
    except (OSError, ValueError, IndexError) as error:
        raise ArtifactError(f"{repo}: its configurations cannot be read ({error}). Make a version live with --to N.") from error
