"""Find where an artifact goes wrong: the first stage of the build, and in it the first block, whose output is not eager's.

The build is done again, stage by stage: base graph, attached, each pass; last comes the file that was written. At each stage every
block's output y is made an output of the graph and compared with what the same module returns in eager PyTorch. A plain checkpoint has
the last stage alone, and its modules are looked into.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from flora_export.artifact import Artifact
from flora_export.backends import backend_of
from flora_export.base_model import BaseModel
from flora_export.branch import BLOCK_KINDS, Branch
from flora_export.capture import capture
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.ledger import load_graph, write_model
from flora_export.passes import ENTERING, lowering, passes_for, place_branches, run_passes
from flora_export.passes.attach_detours import place_detours
from flora_export.passes.hosts import find_hosts
from flora_export.scratch import Scratch
from flora_export.verify.numerics import TOLERANCES

Array = npt.NDArray[np.float32]
QUANTIZED, WRITTEN = "graph after Quantize", "written file"
_BLOCK = re.compile(rf"(?P<block>(?:\w+\.)*layers\.(?P<layer>\d+)\.(?P<name>{'|'.join(BLOCK_KINDS)}))\.")


class Blocks(Protocol):
    """Eager PyTorch, looked into."""

    def block_outputs(self, tokens: Sequence[int], blocks: Sequence[str], *, adapter: bool) -> dict[str, Array]: ...


@dataclass(frozen=True)
class BlockError:
    """How far one block's output is from eager's: `tensor` is the graph's name for it."""

    block: str
    layer: int
    tensor: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.block} ({self.tensor}) is off by {self.error:.3g} (allowed {self.allowed:.3g})"


def localise(
    artifact: Artifact,
    base: BaseModel,
    checkpoint: Checkpoint,
    truth: Blocks,
    tokens: list[int],
    progress: Callable[[str, int, int], None],
    quantized: Blocks | None = None,
) -> str:
    """The first stage and block that diverge, in words; or that none does, and the fault is after the last block.

    `quantized` is the truth of what is quantized: of the last stages of a quantized artifact.
    """
    blocks = [branch.block for branch in observed(artifact, checkpoint)]
    for stage, adapter, directory, branches in _stages(artifact, base, checkpoint):
        progress(f"looking into the {stage}", 0, 1)
        late = quantized if quantized is not None and stage in (QUANTIZED, WRITTEN) else truth
        expected = late.block_outputs(tokens, blocks, adapter=adapter)
        for found in block_errors(Artifact(directory, artifact.manifest), branches, expected, tokens):
            if not found.error <= found.allowed:  # the first in the order of layers is the cause, and the others suffer from it
                return f"{stage}, {found}"
    return "no block is off in any stage; what is left is after the last block (final norm, head), or in cached steps alone"


def _stages(artifact: Artifact, base: BaseModel, checkpoint: Checkpoint) -> Iterator[tuple[str, bool, Path, tuple[Branch, ...]]]:
    """(stage, whether the adapter is in it, directory of its model, branches with hosts), one after the other."""
    manifest = artifact.manifest
    backend = backend_of(artifact)
    written = observed(artifact, checkpoint)
    if not backend.runs_graph:  # the file is the one stage
        yield WRITTEN, True, artifact.path, written
        return
    captured = capture(base, backend.form(manifest.target), manifest.compute)
    run_passes(captured.model, lowering(captured.form, manifest.cache_tokens))
    branches = place_branches(captured.model, checkpoint, base, manifest.align, manifest.fuse, manifest.quantization)
    detours = place_detours(captured.model, checkpoint, base)
    passes = passes_for(manifest.fuse, branches, checkpoint, captured.form, base, manifest.quantization, detours, manifest.align)
    looked_at = branches or hosts_of_changes(captured.model, checkpoint)
    entering = sum(isinstance(pass_, ENTERING) for pass_ in passes)
    for index in range(len(passes) + 1):
        if index:
            run_passes(captured.model, passes[index - 1 : index])
        if 0 < index < entering:  # some of the adapter is in, and eager has nothing like it
            continue
        with Scratch("flora-export-graph-") as name:
            write_model(captured.model, Path(name))
            yield (f"graph after {type(passes[index - 1]).__name__}" if index else "base graph"), index > 0, Path(name), looked_at
    yield WRITTEN, True, artifact.path, looked_at if artifact.is_ir else written  # an IR has the names of the graph


def observed(artifact: Artifact, checkpoint: Checkpoint) -> tuple[Branch, ...]:
    """The blocks of an artifact that are compared with eager's: those with a branch, or else those in which a weight is changed."""
    hosts = {record.block: tuple(record.writes) for record in artifact.manifest.blocks}
    branches = tuple(replace(b, writes=hosts[b.block]) for b in checkpoint.branches if b.block in hosts)
    if branches or not (checkpoint.changes or checkpoint.detours):
        return branches
    return hosts_of_changes(None if artifact.is_checkpoint or artifact.is_ir else load_graph(artifact), checkpoint)


def hosts_of_changes(model: ir.Model | None, checkpoint: Checkpoint) -> tuple[Branch, ...]:
    """A stand-in for each block that has a changed weight or a detour, in the order of layers, with its hosts where there is a graph."""
    layers = {}
    for tensor in (*(change.tensor for change in checkpoint.changes), *(detour.tensor for detour in checkpoint.detours)):
        match = _BLOCK.match(tensor)
        if match is not None:
            layers[match["block"]] = (int(match["layer"]), list(BLOCK_KINDS).index(match["name"]))
    stand_ins = [
        Branch(block, BLOCK_KINDS[block.rpartition(".")[2]], "identity", 1, 1.0) for block in sorted(layers, key=layers.__getitem__)
    ]
    if model is None:
        return tuple(stand_ins)
    found: list[Branch] = []
    for branch in stand_ins:
        with contextlib.suppress(FusionError):  # a layout that has no last projection of its own
            found += find_hosts(model, [branch], None)
    return tuple(found)


def block_errors(artifact: Artifact, branches: Sequence[Branch], expected: dict[str, Array], tokens: list[int]) -> list[BlockError]:
    """Every block's error for one prompt, in the order of layers. `expected` is eager's `block_outputs`."""
    tolerance = TOLERANCES[artifact.manifest.compute].logits
    errors = []
    outputs = backend_of(artifact).block_outputs(artifact, branches, tokens)
    for branch in branches:
        if branch.block not in outputs:
            continue
        want, (name, got) = expected[branch.block], outputs[branch.block]
        layer = next(int(part) for part in branch.block.split(".") if part.isdigit())
        allowed = tolerance * max(1e-3, float(np.abs(want).max()))
        errors.append(BlockError(branch.block, layer, name, float(np.abs(got - want).max()), allowed))
    return errors
