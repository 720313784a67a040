"""The stacks of a bank: which layers of which initializers an adapter fills, and with what.

Layer 0 of a stack is zeros, for the base model; layer `slot + 1` is of the adapter in that slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from flora_export.artifact import DATA, Artifact
from flora_export.bank import STACK, Bank, slot_tensor
from flora_export.base_model import BaseModel, read_json
from flora_export.branch import Branch
from flora_export.checkpoint import Checkpoint
from flora_export.errors import ArtifactError, CheckpointError
from flora_export.ledger import load_graph, sha256_of
from flora_export.manifest import LedgerEntry, Manifest
from flora_export.methods import load_checkpoint, read_config
from flora_export.passes.attach import adapter_reader, weight_name
from flora_export.weights import Array


@dataclass(frozen=True)
class Stack:
    """A stack in an artifact's file: [1 + slots, d, r], or [1 + slots, r, d] for B."""

    branch: Branch  # its rank is the stack's room
    matrix: str
    tensor: ir.ExternalTensor

    @property
    def name(self) -> str:
        return weight_name(self.branch, self.matrix)

    def read(self) -> Array:
        """All of it, in memory of one's own."""
        values: Array = np.array(self.tensor.numpy())
        self.tensor.release()
        return values

    def layer(self, checkpoint: Checkpoint, own: Branch | None) -> Array:
        """What an adapter puts into one layer, [1, ...]: its matrix, and zeros beside it; zeros alone where it has no such branch."""
        dims = [1, *self.tensor.shape.numpy()[1:]]
        if own is None:
            return np.zeros(dims, self.tensor.dtype.numpy())
        return adapter_reader(checkpoint, own, self.matrix, self.tensor.dtype, self.branch.columns)()


def stacked_bank(artifact: Artifact) -> Bank:
    """Raises ArtifactError: the artifact is no bank whose slots can be filled."""
    bank = artifact.manifest.bank
    if bank is None or bank.layout != STACK:
        raise ArtifactError(f"{artifact.path} has no slots to be filled: build it with --bank {STACK}, or with --slots N")
    return bank


def matrices_of(manifest: Manifest) -> list[tuple[Branch, str]]:
    """(branch, matrix) of every stack; none where the artifact is no bank, or its adapters stand side by side."""
    if manifest.bank is None or manifest.bank.layout != STACK:
        return []
    return [(record.branch, matrix) for record in manifest.blocks for matrix in record.branch.matrices]


def read_stacks(artifact: Artifact) -> list[Stack]:
    """The stacks of a bank. Raises ArtifactError: there are none, or they are not what the manifest says."""
    bank = stacked_bank(artifact)
    initializers = load_graph(artifact).graph.initializers
    stacks = []
    for branch, matrix in matrices_of(artifact.manifest):
        value = initializers.get(weight_name(branch, matrix))
        tensor = value.const_value if value is not None else None
        dims = list(tensor.shape.numpy()) if isinstance(tensor, ir.ExternalTensor) else []
        room = 1 if matrix == "B" else 2
        if (
            not isinstance(tensor, ir.ExternalTensor)
            or str(tensor.location) != DATA
            or len(dims) != 3
            or (dims[0], dims[room]) != (bank.slots + 1, branch.rank)
        ):
            raise ArtifactError(f"{artifact.model}: {weight_name(branch, matrix)} is no stack of {bank.slots} slots. Build it again.")
        stacks.append(Stack(branch, matrix, tensor))
    return stacks


def fitting(artifact: Artifact, path: Path, base: BaseModel | None = None) -> Checkpoint:
    """Read and check an adapter that is to go into a bank. Where the base model is not at hand, its configuration in the artifact serves.

    Raises:
        CheckpointError: it is damaged, does not fit the base model, or the bank has no place for it; the message says what and why.
    """
    if base is None:
        config = read_json(artifact.path / "config.json", "model configuration")
        base = BaseModel(str(artifact.manifest.base["name"]), artifact.path, config, ())
    kind, own = (config.get("peft_type") for config in (artifact.manifest.checkpoint["config"], read_config(path)))
    if own != kind:
        raise CheckpointError(f"{path} is {own}, and the adapters of {artifact.path} are {kind}")
    checkpoint = load_checkpoint(path, base, merge=False)
    records = {record.block: record for record in artifact.manifest.blocks}
    for branch in checkpoint.branches:
        record = records.get(branch.block)
        if record is None:
            raise CheckpointError(f"{path}: has a branch beside {branch.block}, where the bank {artifact.path} has none")
        if branch.activation != record.activation:
            raise CheckpointError(f"{path}: {branch.block} has the activation {branch.activation}, in the bank it is {record.activation}")
        if branch.rank > record.rank:
            raise CheckpointError(
                f"{path}: {branch.block} has rank {branch.rank}, and the bank room for {record.rank}. Build it with --align {branch.rank}, "
                "which leaves room for that."
            )
    return checkpoint


def layers_of(stacks: list[Stack], checkpoint: Checkpoint) -> Iterator[tuple[Stack, Branch | None, Array]]:
    """(stack, the adapter's own branch, its layer) of every stack. Raises FusionError where a number overflows the stack's precision."""
    own = {branch.block: branch for branch in checkpoint.branches}
    for stack in stacks:
        branch = own.get(stack.branch.block)
        yield stack, branch, stack.layer(checkpoint, branch)


def entry_of(stack: Stack, branch: Branch | None, slot: int, layer: Array) -> LedgerEntry:
    """A layer as the ledger has it."""
    where = (stack.name, 0, slot + 1, slot + 2)
    if branch is None:
        return LedgerEntry("zeros", "zeros", *where, 1.0, sha256_of(layer))
    scale = branch.scale if stack.matrix == "B" else 1.0
    return LedgerEntry(slot_tensor(slot, branch.tensor(stack.matrix)), "adapter", *where, scale, sha256_of(layer))
