"""Build the arms of the benchmark: the base model alone, other fuse levels and LoRA, for the target and precision of an artifact."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flora_export.artifact import DATA, IR_DATA, Artifact
from flora_export.backends import backend_of
from flora_export.bank import slot_tensor
from flora_export.base_model import BaseModel
from flora_export.branch import by_pattern
from flora_export.capture import capture
from flora_export.checkpoint import CONFIG, WEIGHTS, Checkpoint
from flora_export.manifest import ChangeRecord, Manifest
from flora_export.methods import load_checkpoint
from flora_export.passes import fuse_adapter, lowering, run_passes
from flora_export.passes.quantize import Quantize
from flora_export.verify.latency import BASE

EAGER, FUSED, LORA, LORA_BUDGET = "eager", "fused", "lora", "lora-budget"
BANK, SINGLE = "bank", "single"  # an artifact of several adapters, and one of these fused by itself
FUSE_LEVELS = {"unfused": "none", "forward": "forward", "backward": "backward"}
# LoRA on all linear projections: whether it is merged, and how far it is fused where it is not.
LORA_LEVELS = {LORA: (False, "none"), LORA_BUDGET: (False, "none"), "lora-forward": (False, "both"), "lora-merged": (True, "both")}
ARMS = (EAGER, BASE, *FUSE_LEVELS, FUSED, *LORA_LEVELS)
BANK_ARMS = (BASE, SINGLE, BANK, LORA)


@dataclass(frozen=True)
class Built:
    """An arm on disk; eager PyTorch has no artifact. `parameters` are the trainable numbers of its adapter."""

    artifact: Artifact | None
    parameters: int
    lora_rank: int | None = None

    @property
    def bytes(self) -> int | None:
        return (self.artifact.path / (IR_DATA if self.artifact.is_ir else DATA)).stat().st_size if self.artifact else None


def random_checkpoint(manifest: Manifest, base: BaseModel, directory: Path) -> Checkpoint:
    """An adapter with the artifact's configuration and random numbers, read as any other: latency does not depend on the numbers.

    Of a bank it is like the first of its adapters.
    """
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    config, bank = manifest.checkpoint["config"], manifest.bank
    first = "" if bank is None else slot_tensor(min(bank.taken.values()), "")
    for block in manifest.blocks:
        rank = block.rank if bank is None else by_pattern(block.block, config["r"], config["rank_pattern"])
        branch = dataclasses.replace(block.branch, rank=rank)
        if first + branch.tensor("A") not in manifest.checkpoint["tensors"]:
            continue  # the first has no branch there
        for matrix in branch.matrices:
            numbers = rng.standard_normal(branch.shape(matrix, base.width), np.float32)
            tensors[branch.tensor(matrix)] = numbers * np.float32(0.02)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return load_checkpoint(directory, base)


def random_lora(base: BaseModel, rank: int, directory: Path, *, merge: bool = False) -> Checkpoint:
    """A LoRA of random numbers on all linear projections, as PEFT would write it, read as any other."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    shapes = {name.removesuffix(".weight"): shape for name, shape in base.shapes.items() if ".layers." in name and len(shape) == 2}
    tensors = {}
    for module, (outputs, inputs) in shapes.items():
        for matrix, dims in (("A", (rank, inputs)), ("B", (outputs, rank))):
            numbers = rng.standard_normal(dims, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.lora_{matrix}.weight"] = numbers
    save_file(tensors, directory / WEIGHTS)
    return load_checkpoint(directory, base, merge=merge)


def lora_parameters(base: BaseModel, rank: int) -> int:
    """Trainable numbers of a LoRA on all linear projections."""
    return rank * sum(sum(shape) for name, shape in base.shapes.items() if ".layers." in name and len(shape) == 2)


def _trained(change: ChangeRecord, shape: tuple[int, ...]) -> int:
    """Trainable numbers behind a changed weight: A and B, and a number for each row for what stands beside them; or all of it."""
    return change.rank * sum(shape) + (len(change.sources) - 2) * shape[0] if change.rank else math.prod(shape)


def build_arm(arm: str, out: Artifact, base: BaseModel, checkpoint: Checkpoint | None, directory: Path) -> Built:
    """Build an arm of ARMS into a directory. `fused`, or `bank`, is the artifact `out` itself.

    Without a checkpoint there are only `base` and `fused`. LoRA has the rank that most of the adapter's branches have; within the budget,
    the rank that comes nearest to its parameters.

    Raises:
        FloraExportError: the base model cannot be captured, or has a block that LoRA or a fuse level cannot be put beside.
    """
    branches = checkpoint.branches if checkpoint is not None else ()
    adapter = sum(int(np.prod(b.shape(m, base.width))) for b in branches for m in b.matrices)
    if not out.manifest.merge:
        adapter += sum(block.rank * sum(base.shapes[f"{block.block}.weight"]) for block in out.manifest.blocks)
    adapter += sum(_trained(change, base.shapes[change.tensor]) for change in out.manifest.changes)
    if arm in (EAGER, FUSED, BANK):
        return Built(None if arm == EAGER else out, adapter * (len(out.manifest.bank.taken) if out.manifest.bank is not None else 1))
    manifest = dataclasses.replace(out.manifest, bank=None)
    backend = backend_of(out)
    captured = capture(base, backend.form(manifest.target), manifest.compute)
    quantization = manifest.quantization
    parameters, rank = 0, None
    directory.mkdir()
    if arm == BASE:
        run_passes(captured.model, lowering(captured.form, manifest.cache_tokens))
        if quantization is not None:
            run_passes(captured.model, [Quantize(quantization, base.packed)])
    else:
        assert checkpoint is not None
        level, parameters = FUSE_LEVELS.get(arm, "both"), adapter
        if arm in LORA_LEVELS:
            merge, level = LORA_LEVELS[arm]
            rank = max(1, round(adapter / lora_parameters(base, 1))) if arm == LORA_BUDGET else statistics.mode(b.rank for b in branches)
            parameters = lora_parameters(base, rank)
            checkpoint = random_lora(base, rank, directory / "adapter", merge=merge)
            quantization = dataclasses.replace(quantization, adapter_bits=0) if quantization is not None else None  # it keeps its precision
        cache = manifest.cache_tokens
        fuse_adapter(captured, base, checkpoint, level, align=manifest.align, cache_tokens=cache, quantization=quantization)
    backend.store(captured.model, directory)
    return Built(Artifact(directory, dataclasses.replace(manifest, blocks=[], ledger=[])), parameters, rank)
