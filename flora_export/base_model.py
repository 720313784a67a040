"""The base model: a Hugging Face directory of safetensors and JSON, checked before anything large is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from flora_export.errors import CheckpointError
from flora_export.quantization.unpacking import Packed, read_packed, write_plain

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
HEAD = "lm_head.weight"
MAX_LAYERS = 1000
MIN_CONTEXT = 32  # tokens: verification needs a prompt and 16 steps
LARGE = 2 * 2**30  # bytes of weights in fp32, beyond which a verification maps them from their files
MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # of a safetensors file: of the largest models, all files together have as much
LONGEST_NAME = 256  # of a hub repository
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")  # a branch, a tag or a commit: it becomes a path in the hub's cache
BESIDE = (".json", ".jinja", ".model", ".txt")  # ends of the names of what stands beside the weights
TOKENIZERS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")  # how those of a tokenizer begin
# What is fetched of a hub repository: weights as safetensors, configuration and tokenizer. Never pickles, never code.
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk. `name` is what the user called it, `weights` its safetensors files."""

    name: str
    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    packed: Packed | None = None  # its own integers, where it is quantized: `path` is then the plain checkpoint that they stand for
    original: BaseModel | None = None  # as it lies on disk
    unpacked: Any = field(default=None, compare=False)  # keeps `path`

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def context(self) -> int:
        """How many tokens the model takes; `load_base` has checked it, or filled it in."""
        return int(self.config["max_position_embeddings"])

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """Which file each of its tensors is in, in the order of files and names."""
        return {name: file for file in self.weights for name in sorted(_header(file))}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of its tensors."""
        return {name: shape for file in self.weights for name, shape in sorted(_header(file).items())}

    @property
    def beside(self) -> list[Path]:
        """The files beside its weights: configurations, and those of the tokenizer."""
        return [file for file in self.path.iterdir() if file.suffix in BESIDE and file.is_file()]

    @property
    def fp32_bytes(self) -> int:
        """What its weights would take in fp32."""
        return 4 * sum(map(math.prod, self.shapes.values()))

    @property
    def is_large(self) -> bool:
        return self.fp32_bytes > LARGE

    def read(self, tensor: str) -> npt.NDArray[Any]:
        """A tensor as its file has it."""
        with safe_open(self.tensors[tensor], framework="numpy") as file:
            values: npt.NDArray[Any] = file.get_tensor(tensor)
        return values

    @property
    def tied(self) -> bool:
        """Whether embeddings and head are one table."""
        return bool(self.config.get("tie_word_embeddings")) or not any(name.endswith(HEAD) for name in self.tensors)

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the configuration and of each weight file, by file name."""
        if self.original is not None:
            return self.original.digests
        return {path.name: file_sha256(path) for path in (self.path / "config.json", *self.weights)}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # not a dict


def load_base(name: str) -> BaseModel:
    """Find the base model and check what can be checked without reading its weights.

    Args:
        name: a directory, or a hub repository that is cached or can be downloaded, as `owner/name` or `owner/name@revision`.

    Raises:
        CheckpointError: no such directory or repository, no safetensors weights, or a broken file; the message says which.
    """
    path = directory_of(name) or _from_hub(name)
    config = read_json(path / "config.json", "base model configuration")
    for key in ("hidden_size", "num_hidden_layers"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise CheckpointError(
                f"{path}/config.json: {key} is {config.get(key)!r}, but a decoder-only language model states it as a whole number. "
                "Multimodal and encoder-decoder models are not supported."
            )
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise CheckpointError(
            f"{path}/config.json: num_hidden_layers is {config['num_hidden_layers']}; no model has more than {MAX_LAYERS}"
        )
    context = config.setdefault("max_position_embeddings", 2048)
    if not isinstance(context, int) or context < MIN_CONTEXT:
        raise CheckpointError(
            f"{path}/config.json: max_position_embeddings is {context!r}, but must be a whole number of at least {MIN_CONTEXT}"
        )
    if not isinstance(config.get("vocab_size"), int):
        raise CheckpointError(f"{path}/config.json: vocab_size is {config.get('vocab_size')!r}, but must be a whole number")
    if (path / GENERATION).is_file():
        read_json(path / GENERATION, "generation configuration")
    _check_beside(path)
    base = BaseModel(name, path, config, _weight_files(path))
    if "quantization_config" in config:
        base = _unpack(base)
    _check_sizes(base)
    return base


def directory_of(name: str) -> Path | None:
    """The directory that a base model's name stands for, if there is one."""
    try:
        path = Path(name).expanduser() if name else None
        return path if path is not None and path.is_dir() else None
    except (OSError, RuntimeError):  # longer than a name can be; a user that is not there
        return None


def _check_beside(path: Path) -> None:
    """What stands beside the weights is copied into artifacts, so a link to a file of somebody else would publish that."""
    home = path.resolve()
    for file in path.iterdir():
        if file.suffix not in BESIDE:
            continue
        target = Path(os.path.realpath(file))
        if file.is_symlink() and not target.is_relative_to(home) and target.parent != home.parent.parent / "blobs":  # of the hub's cache
            raise CheckpointError(f"{file} is a link to {target}, outside of the model's directory. Put the file itself there.")
        if file.name.startswith(TOKENIZERS) and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, more than the {MAX_JSON_BYTES} that any tokenizer needs")


def _check_sizes(base: BaseModel) -> None:
    """Sizes in the configuration are those of matrices, so that no weight is larger than the largest that is there."""
    largest = max((dim for shape in base.shapes.values() for dim in shape), default=0)
    for key in ("head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        value = base.config.get(key)
        if isinstance(value, int) and value > largest:
            raise CheckpointError(f"{base.path}/config.json: {key} is {value}, but no weight has a side of more than {largest}")


def _unpack(base: BaseModel) -> BaseModel:
    """A quantized base model as the plain one that it stands for. Raises CheckpointError where it is of a kind that is not read."""
    packed = read_packed(base.path, base.config, base.tensors)
    try:
        directory = write_plain(packed, base.path, base.config)
    except OSError as error:
        raise CheckpointError(f"{base.path}: could not be unpacked into {tempfile.gettempdir()} ({error.strerror}). Make room.") from error
    path = Path(directory.name)
    config = read_json(path / "config.json", "base model configuration")
    return BaseModel(base.name, path, config, _weight_files(path), packed, base, directory)


def _from_hub(name: str) -> Path:
    repository, at, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1 or len(repository) >= LONGEST_NAME:
        raise CheckpointError(
            f"base model {name[:200]!r}: no such directory, and not a hub name of the form owner/name or owner/name@revision. "
            "Pass --base DIR."
        )
    if at and (not REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"base model {repository}: {revision[:200]!r} is no revision: a branch, a tag or a commit. Pass --base DIR.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"base model {name!r}: no such directory, not in the local hub cache, and the hub could not deliver it "
            f"({type(error).__name__}). Where there is no network, pass --base DIR with a local copy of the model."
        ) from error


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / INDEX).is_file() and (path / SINGLE).is_file():
        raise CheckpointError(f"base model {path}: has both {SINGLE} and {INDEX}; tools differ in which they read. Remove the stale one.")
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX, "weight index").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path / INDEX}: has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE]
    files: list[Path] = []
    for name in names:
        file = path / name
        if not is_file_name(name):
            raise CheckpointError(f"{path / INDEX}: names {name!r}, which leaves the model's directory")
        if not file.is_file():
            others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
            hint = f"It has {', '.join(others)}; only safetensors are read: convert the model first." if others else "Download its weights."
            raise CheckpointError(f"base model {path}: {name} is missing. {hint}")
        check_safetensors(file)
        files.append(file)
    return tuple(files)


def is_file_name(name: str) -> bool:
    """Whether a stranger's text names a file of the directory that it stands in: no path, and nothing that no file can be called."""
    return Path(name).name == name not in ("", "..") and "\0" not in name and len(name.encode("utf-8", "surrogatepass")) <= 255


def check_safetensors(file: Path) -> None:
    """Raise CheckpointError unless the header is sound and describes exactly the bytes that follow it."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if MAX_HEADER_BYTES < length < file.stat().st_size:
            raise CheckpointError(f"{file}: has a header of {length} bytes; no model's file has more than {MAX_HEADER_BYTES}")
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}). Copy or save it again.") from error


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError where it is missing, oversized, no object, or holds half a character."""
    if not file.is_file():
        raise CheckpointError(f"{what}: {file} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{what}: {file} has {file.stat().st_size} bytes, more than the {MAX_JSON_BYTES} that are read")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\u" in text:  # which can say half a character, and nobody could print that
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: {file} is not JSON ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{what}: {file} cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: {file} holds a {type(content).__name__}, but an object was expected")
    return content


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
