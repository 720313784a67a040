"""Banks of tiny adapters, and what they answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.manifest import LedgerEntry
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import make_adapter
from tests.mutate import edit

NAMES = ("first", "second", "third")
PROMPTS = [[5, 9, 2, 44, 17], [7, 3], [11, 30, 8], [5, 9, 2, 44]]


def make_adapters(base: Path, root: Path) -> dict[str, Path]:
    """Three adapters: two ranks, other blocks, other numbers."""
    return {
        "first": make_adapter(base, root / "first", r=4, seed=1),
        "second": make_adapter(base, root / "second", r=6, seed=2),
        "third": make_adapter(base, root / "third", r=4, seed=3, target_modules=["mlp"]),
    }


def make_bank(adapters: dict[str, Path], base: Path, out: Path, layout: str | None, **options: Any) -> Artifact:
    slots, check = options.pop("slots", None), options.pop("verify", True)
    bank = BankOptions(tuple(adapters.items()), layout, slots)
    return build(next(iter(adapters.values())), str(base), out, BuildOptions(verify=check, bank=bank, **options), silent)[0]


def logits(decoder: Decoder, prompts: Sequence[list[int]], slots: int | Sequence[int] | None, steps: int = 3) -> list[np.ndarray]:
    """Of each row: the prompt's and those of a few given tokens."""
    if slots is not None:
        decoder.choice.choose(slots)
    rows = [[row] for row in decoder.start(prompts)]
    for step in range(steps):
        for row, values in zip(rows, decoder.step([step + 1] * len(prompts)), strict=True):
            row.append(values[None])
    return [np.concatenate(row) for row in rows]


def fill(out: Path, which: Callable[[LedgerEntry], bool], number: float) -> None:
    """Overwrite adapters' slices in the file."""

    def change(entry: LedgerEntry, view: Any) -> None:
        if entry.origin == "adapter" and which(entry):
            view[...] = number

    edit(out, change, forge=False)


def scaled(adapter: Path, to: Path, factor: float) -> Path:
    """The same adapter with another B."""
    shutil.copytree(adapter, to)
    tensors = load_file(to / "adapter_model.safetensors")
    save_file({name: values * factor if "ffba_B" in name else values for name, values in tensors.items()}, to / "adapter_model.safetensors")
    return to
