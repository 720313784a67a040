"""What `manifest.json` holds, record by record."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from flora_export.bank import Bank
from flora_export.branch import BLOCK_KINDS, Branch
from flora_export.quantization import Quantization

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LedgerEntry:
    """One source tensor and the slice [start, stop) along `axis` of the initializer that it fills, times `scale`.

    `sha256` is the digest of the slice's bytes, C order, as they came from the source, not from the written file.
    """

    tensor: str
    origin: str  # "adapter", "base", "changed", "zeros" or "constant"
    initializer: str
    axis: int
    start: int
    stop: int
    scale: float
    sha256: str
    form: str = ""  # of a quantized weight: which of its numbers these are, and how they were made (quantization/packing.py)


@dataclass(frozen=True)
class BlockRecord:
    """How one branch is in the graph: `fusion` is neurons, forward+backward, forward, backward or none; `reason` says why not both.

    Of a bank, the rank is that of all adapters together, or in a stack the one that each has room for; scales are the ledger's.
    Of an A and a B beside one projection, `block` is the projection, which is its own host on both sides.
    """

    block: str
    activation: str
    rank: int
    scale: float
    fusion: str
    reason: str
    reads: list[str]
    writes: list[str]

    @property
    def branch(self) -> Branch:
        """Itself as a branch beside a block, without its hosts."""
        kind = BLOCK_KINDS.get(self.block.rpartition(".")[2], "mlp")
        return Branch(self.block, kind, self.activation, self.rank, self.scale)


@dataclass(frozen=True)
class ChangeRecord:
    """A weight of the base that the adapter has changed: how, by which of its tensors, of what rank (0: none) and scale."""

    tensor: str
    what: str
    sources: list[str]
    rank: int
    scale: float


@dataclass(frozen=True)
class Tensor:
    """A graph input or output. Dimensions are whole numbers or names."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact. Nothing in it depends on when or where it was built."""

    backend: str
    target: str
    precision: str
    fuse: str
    passes: list[str]
    padding: str  # side on which ragged prompts are padded: "right" where the graph has GroupQueryAttention, else "left"
    verified: bool
    versions: dict[str, str]
    base: dict[str, Any]  # name, files: SHA-256 by file name
    checkpoint: dict[str, Any]  # digest, files, config, tensors
    inputs: list[Tensor]
    outputs: list[Tensor]
    operators: dict[str, dict[str, int]]  # "before" and "after": how many nodes of each operator
    blocks: list[BlockRecord]
    ledger: list[LedgerEntry]
    align: int = 1  # ranks are padded with zeros to a multiple of it
    cache_tokens: int = 0  # places of a static KV cache; 0: the cache grows
    engine: dict[str, Any] = field(default_factory=dict)  # of a compiled backend: how its engine was made, and what for
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # sha256, bytes
    changes: list[ChangeRecord] = field(default_factory=list)  # of the base's weights; written where there are any
    quantization: Quantization | None = None  # written where weights are quantized
    merge: bool = True  # whether low-rank changes are in the base's weights, not beside them; written where they are beside
    bank: Bank | None = None  # written where the graph holds several adapters
    schema_version: int = SCHEMA_VERSION

    @property
    def compute(self) -> str:
        """The precision of what is not quantized."""
        return self.quantization.compute if self.quantization is not None else self.precision

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for name in ("changes", "quantization", "bank"):
            if not content[name]:
                del content[name]
        if self.merge:
            del content["merge"]
        for entry in content["ledger"]:
            if not entry["form"]:
                del entry["form"]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


# What is a list of records.
RECORDS: dict[str, type] = {"inputs": Tensor, "outputs": Tensor, "blocks": BlockRecord, "changes": ChangeRecord, "ledger": LedgerEntry}

_VALUES = {
    "target": ("cpu", "cuda", "gpu", "npu", "any"),
    "precision": ("fp32", "fp16", "bf16", "int4", "int8"),
    "padding": ("left", "right"),
}
# What is in the dictionaries that hold more than a record says: key -> type.
_INSIDE: dict[str, dict[str, Any]] = {
    "base": {"name": str, "files": dict[str, str]},
    "checkpoint": {"digest": str, "files": dict[str, str], "config": dict[str, Any], "tensors": list[str]},
}
_FILE: dict[str, Any] = {"sha256": str, "bytes": int}


def checked(record: Any) -> Any:
    """A record read from JSON, whose fields, and what is in them, must have the annotated types. Raises ValueError, KeyError."""
    for name, kind in _HINTS[type(record)].items():
        value = getattr(record, name)
        known = value in _VALUES[name] if isinstance(record, Manifest) and name in _VALUES else True
        if not known or not fits(value, kind):
            raise ValueError(f"{type(record).__name__}.{name} is {value!r:.200}")
    if isinstance(record, Manifest):
        places = [(name, getattr(record, name), inside) for name, inside in _INSIDE.items()]
        for name, given, inside in (*places, *((f"files[{name!r}]", known, _FILE) for name, known in record.files.items())):
            for key, kind in inside.items():
                if not fits(given[key], kind):
                    raise ValueError(f"Manifest.{name} has {key} {given[key]!r:.200}")
        if record.align < 1 or record.cache_tokens < 0:
            raise ValueError(f"Manifest has align {record.align} and cache_tokens {record.cache_tokens}")
    return record


_HINTS = {cls: typing.get_type_hints(cls) for cls in (Manifest, Quantization, Bank, *RECORDS.values())}


def fits(value: Any, kind: Any) -> bool:  # noqa: PLR0911  # a line for each type
    """Whether a value of JSON is of an annotated type. Numbers must be finite, and whole ones have 64 bits."""
    inner = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case typing.Any:
            return True
        case types.UnionType:
            return any(fits(value, each) for each in inner)
        case builtins.dict:
            return isinstance(value, dict) and all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
        case builtins.list | builtins.tuple as sequence:
            return isinstance(value, sequence) and all(fits(each, inner[0]) for each in value)
        case builtins.bool:
            return isinstance(value, bool)
        case builtins.int:
            return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        case builtins.float:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # NaN is not
        case other:
            return isinstance(value, other)
