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

from flora_export.artifact import DATA, Artifact
from flora_export.backends import backend_of
from flora_export.base_model import BaseModel
from flora_export.branch import BLOCK_KINDS, Branch
from flora_export.capture import capture
from flora_export.checkpoint import CONFIG, WEIGHTS, Checkpoint
from flora_export.ledger import write_model
from flora_export.manifest import ChangeRecord, Manifest
from flora_export.methods import load_checkpoint
from flora_export.passes import fuse_adapter, lowering, run_passes
from flora_export.passes.attach_lora import AttachLora, lora_hosts, lora_parameters
from flora_export.passes.quantize import Quantize
from flora_export.verify.latency import BASE

EAGER, FUSED, LORA, LORA_BUDGET = "eager", "fused", "lora", "lora-budget"
FUSE_LEVELS = {"unfused": "none", "forward": "forward", "backward": "backward"}
ARMS = (EAGER, BASE, *FUSE_LEVELS, FUSED, LORA, LORA_BUDGET)


@dataclass(frozen=True)
class Built:
    """An arm on disk; eager PyTorch has no artifact. `parameters` are the trainable numbers of its adapter."""

    artifact: Artifact | None
    parameters: int
    lora_rank: int | None = None

    @property
    def bytes(self) -> int | None:
        return (self.artifact.path / DATA).stat().st_size if self.artifact else None


def random_checkpoint(manifest: Manifest, base: BaseModel, directory: Path) -> Checkpoint:
    """An adapter with the artifact's configuration and random numbers, read as any other: latency does not depend on the numbers."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for block in manifest.blocks:
        branch = Branch(block.block, BLOCK_KINDS[block.block.rpartition(".")[2]], block.activation, block.rank, block.scale)
        for matrix in branch.matrices:
            numbers = rng.standard_normal(branch.shape(matrix, base.width), np.float32)
            tensors[branch.tensor(matrix)] = numbers * np.float32(0.02)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(manifest.checkpoint["config"]), encoding="utf-8")
    return load_checkpoint(directory, base)


def _trained(change: ChangeRecord, shape: tuple[int, ...]) -> int:
    """Trainable numbers behind a changed weight: A and B, and a number for each row for what stands beside them; or all of it."""
    return change.rank * sum(shape) + (len(change.sources) - 2) * shape[0] if change.rank else math.prod(shape)


def build_arm(arm: str, out: Artifact, base: BaseModel, checkpoint: Checkpoint | None, directory: Path) -> Built:
    """Build an arm of ARMS into a directory. `fused` is the artifact `out` itself.

    Without a checkpoint there are only `base` and `fused`. LoRA has the rank that most of the adapter's branches have; within the budget,
    the rank that comes nearest to its parameters.

    Raises:
        FloraExportError: the base model cannot be captured, or has a block that LoRA or a fuse level cannot be put beside.
    """
    branches = checkpoint.branches if checkpoint is not None else ()
    adapter = sum(int(np.prod(b.shape(m, base.width))) for b in branches for m in b.matrices)
    adapter += sum(_trained(change, base.shapes[change.tensor]) for change in out.manifest.changes)
    if arm in (EAGER, FUSED):
        return Built(out if arm == FUSED else None, adapter)
    manifest = out.manifest
    captured = capture(base, backend_of(out).form(manifest.target), manifest.compute)
    quantization = manifest.quantization
    parameters, rank = 0, None
    if arm not in FUSE_LEVELS:
        run_passes(captured.model, lowering(captured.form, manifest.cache_tokens))
    if arm in FUSE_LEVELS:
        assert checkpoint is not None
        level, cache = FUSE_LEVELS[arm], manifest.cache_tokens
        fuse_adapter(captured, base, checkpoint, level, align=manifest.align, cache_tokens=cache, quantization=quantization)
        parameters = adapter
    elif arm != BASE:
        hosts = lora_hosts(captured.model, base, branches[0].block.rsplit(".", 2)[0])
        same = statistics.mode(branch.rank for branch in branches)
        rank = same if arm == LORA else max(1, round(adapter / lora_parameters(hosts, 1)))
        parameters = lora_parameters(hosts, rank)
        run_passes(captured.model, [AttachLora(hosts, rank)])
    if quantization is not None and arm not in FUSE_LEVELS:
        run_passes(
            captured.model, [Quantize(dataclasses.replace(quantization, adapter_bits=0), base.packed)]
        )  # what stands beside keeps its precision
    directory.mkdir()
    write_model(captured.model, directory)
    return Built(Artifact(directory, dataclasses.replace(manifest, blocks=[], ledger=[])), parameters, rank)
