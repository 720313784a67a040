"""Bank: several adapters of one base model in one graph, each row of a batch with its own. Plain facts, no torch, no onnx.

The graph has one more input, `adapter_ids`: int64 [batch], the slot of each row's adapter; -1 is the base model.

`columns`: the adapters stand side by side in the widened projections. x [W A1 A2 ...] is one GEMM, and a row keeps the columns of its own
adapter before B. `stack`: A and B of all adapters are stacked by slot, and each row gathers its own and multiplies by them, beside the
base's projections. Its slots can be empty, and be filled or replaced later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flora_export.errors import FloraExportError

ADAPTER_IDS = "adapter_ids"
BASE = -1  # the id of the base model, and its name at the edge
BASE_NAME = "base"
COLUMNS, STACK = "columns", "stack"
LAYOUTS = (COLUMNS, STACK)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Bank:
    """The adapters of a bank by slot, as a manifest records them. An empty slot has the name "" and no digest."""

    layout: str
    names: tuple[str, ...]
    digests: tuple[str, ...]  # SHA-256 of each checkpoint

    def __post_init__(self) -> None:
        """Raises ValueError: a manifest says what cannot be."""
        object.__setattr__(self, "names", tuple(self.names))  # JSON has lists
        object.__setattr__(self, "digests", tuple(self.digests))
        taken = [name for name in self.names if name != ""]
        sound = all(isinstance(name, str) and NAME.fullmatch(name) and name != BASE_NAME for name in taken)
        if self.layout not in LAYOUTS or not sound or not taken or len(set(taken)) < len(taken) or len(self.digests) != len(self.names):
            raise ValueError(f"bank is {self.layout!r} with the adapters {self.names!r}")

    @property
    def slots(self) -> int:
        return len(self.names)

    @property
    def taken(self) -> dict[str, int]:
        """Slot by name, of those that are not empty."""
        return {name: slot for slot, name in enumerate(self.names) if name}

    def slot(self, name: str) -> int:
        """As `find_slot`."""
        return find_slot(self.taken, name)


def checked_name(name: str) -> str:
    """Raises FloraExportError: no adapter can have this name."""
    if not NAME.fullmatch(name) or name == BASE_NAME:
        raise FloraExportError(f"{name!r} cannot be an adapter's name: up to 64 letters, digits, '.', '_', '-', and not {BASE_NAME!r}")
    return name


def find_slot(taken: Mapping[str, int], name: str) -> int:
    """The id of an adapter by its name, or of the base model. Raises FloraExportError with the names that there are."""
    known = {**taken, BASE_NAME: BASE}
    if name not in known:
        raise FloraExportError(f"there is no adapter {name!r}; there are {', '.join(known)}")
    return known[name]


def slot_tensor(slot: int, tensor: str) -> str:
    """A tensor's name in a checkpoint, or a ledger, that is made of several adapters."""
    return f"{slot}:{tensor}"


def slot_of(tensor: str) -> int:
    """The adapter that a name of `slot_tensor` says. Raises FloraExportError: it says none."""
    slot, mark, _ = tensor.partition(":")
    if not mark or not slot.isdecimal():
        raise FloraExportError(f"{tensor!r} is no tensor of an adapter in a bank, whose names begin with a slot")
    return int(slot)
