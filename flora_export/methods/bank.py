"""Adapters of one base model as the members of a bank, each with a slot and a name."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_export.bank import COLUMNS, LAYOUTS, STACK, Bank, checked_name, slot_tensor
from flora_export.checkpoint import Checkpoint
from flora_export.errors import CheckpointError, FloraExportError
from flora_export.quantization import BITS

# Side by side, every adapter adds its columns to every row's work; gathered, a row pays for its own alone, and for the gathering. Measured
# where the two cross: docs/bank.md.
MOST_COLUMNS = 128  # of all adapters together, beside one block


@dataclass(frozen=True)
class BankOptions:
    """What a user wants: adapters by slot, with their names; `slots` and `layout` None where nothing is said of them."""

    members: tuple[tuple[str, Path], ...]
    layout: str | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        """Raises FloraExportError: options that do not go together."""
        if self.slots is not None and self.slots < len(self.members):
            raise FloraExportError(f"--slots {self.slots}: there are {len(self.members)} adapters")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise FloraExportError(f"--bank {self.layout!r}: there are {', '.join(LAYOUTS)}")
        if self.layout == COLUMNS and self.slots is not None:
            raise FloraExportError(f"--slots makes places that are filled later, which only --bank {STACK} has")

    def moved(self, place: Callable[[Path], Path]) -> BankOptions:
        """The same, of adapters that are somewhere else."""
        return dataclasses.replace(self, members=tuple((name, place(path)) for name, path in self.members))

    def layout_for(self, checkpoints: Sequence[Checkpoint], precision: str) -> str:
        """The layout that was asked for, or else the one that is faster; beside quantized weights a stack, whose adapters keep theirs.

        LoRAs, for which a stack has no place, stand in columns always.

        Raises FloraExportError: FFBA in columns of quantized weights, whose blocks of rows would be shared by several B.
        """
        beside = any(checkpoint.detours for checkpoint in checkpoints)
        if self.layout == COLUMNS and precision in BITS and not beside:
            raise FloraExportError(f"--bank {COLUMNS} --precision {precision}: beside quantized weights adapters stand in a {STACK}")
        columns = Counter[str]()
        for checkpoint in checkpoints:
            columns.update({branch.block: branch.rank for branch in checkpoint.branches})
        fits = max(columns.values(), default=0) <= MOST_COLUMNS and precision not in BITS
        return self.layout or (COLUMNS if (fits or beside) and self.slots is None else STACK)


def named(paths: Sequence[Path], names: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Adapters by their names; without these, by the last part of each path.

    Raises:
        FloraExportError: there are more or fewer names than adapters, two are the same, or one cannot be.
    """
    chosen = list(names) or [re.sub(r"[^A-Za-z0-9._-]", "-", path.resolve().name).lstrip("._-")[:64] for path in paths]
    if len(chosen) != len(paths):
        raise FloraExportError(f"{len(chosen)} names ({', '.join(chosen)}) for {len(paths)} adapters: give --name once for each, in order")
    for name, path in zip(chosen, paths, strict=True):
        try:
            checked_name(name)
        except FloraExportError as error:
            raise FloraExportError(f"{path}: {error}. Name it with --name, once for each adapter, in order.") from error
        if chosen.count(name) > 1:
            raise FloraExportError(f"two adapters have the name {name!r}: give each its own with --name, in order")
    return tuple(zip(chosen, paths, strict=True))


def gathered(members: Mapping[int, tuple[str, Checkpoint]], layout: str, slots: int) -> Checkpoint:
    """Adapters by slot, each with its name, as one checkpoint whose tensors are named `0:...`, `1:...` by slot.

    Raises:
        CheckpointError: one of them changes the base's own weights, which the others need as they are.
    """
    branches, detours = [], []
    for slot, (name, checkpoint) in members.items():
        if checkpoint.changes:
            change = checkpoint.changes[0]
            raise CheckpointError(
                f"{checkpoint.path} ({name}): {change.what} changes {change.tensor} itself, which all adapters of a bank share. In a bank "
                "there are FFBA and LoRA, as A and B beside the base."
            )
        if checkpoint.detours and layout == STACK:
            raise CheckpointError(
                f"{checkpoint.path} ({name}) is a LoRA, and a stack has places for FFBA alone: build with --bank {COLUMNS}, without --slots"
            )
        branches += [dataclasses.replace(branch, keys=slot_tensor(slot, branch.keys)) for branch in checkpoint.branches]
        detours += [dataclasses.replace(d, a=slot_tensor(slot, d.a), b=slot_tensor(slot, d.b)) for d in checkpoint.detours]
    if branches and detours:
        raise CheckpointError("a bank holds FFBA adapters or LoRAs, not both: make a bank of each")
    digests = {f"{slot}/{name}": sha for slot, (_, each) in members.items() for name, sha in each.digests.items()}
    names = tuple(members[slot][0] if slot in members else "" for slot in range(slots))
    own = tuple(members[slot][1].digest if slot in members else "" for slot in range(slots))
    return dataclasses.replace(
        next(iter(members.values()))[1],
        branches=tuple(branches),
        detours=tuple(detours),
        digests=digests,
        parts=tuple((members[slot][1].path if slot in members else Path(), 1.0) for slot in range(slots)),
        bank=Bank(layout, names, own),
    )
