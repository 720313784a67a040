"""The passes and their order. Each is pure graph algebra; together they are the whole compiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.branch import Branch
from flora_export.capture import Capture
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.passes.attach import Attach
from flora_export.passes.fold_neurons import FoldNeurons
from flora_export.passes.fuse_backward import FuseBackward
from flora_export.passes.fuse_forward import FuseForward
from flora_export.passes.hosts import find_hosts


@dataclass(frozen=True)
class Fused:
    """A captured base model with its adapter in the graph, and how it got there: what a backend is given."""

    capture: Capture
    base: BaseModel
    checkpoint: Checkpoint
    branches: tuple[Branch, ...]  # with their hosts
    fuse: str
    passes: tuple[str, ...]
    operators_before: dict[str, int]

    @property
    def model(self) -> ir.Model:
        return self.capture.model


def fuse_adapter(capture: Capture, base: BaseModel, checkpoint: Checkpoint, fuse: str) -> Fused:
    """Attach the adapter to the captured graph and fuse it to a level, in place.

    Raises:
        FusionError: a branch cannot be attached or fused; the message names it.
    """
    before = operator_counts(capture.model)
    branches = find_hosts(capture.model, checkpoint.branches, base.width)
    passes = passes_for(fuse, branches, checkpoint)
    run_passes(capture.model, passes)
    return Fused(capture, base, checkpoint, branches, fuse, tuple(type(pass_).__name__ for pass_ in passes), before)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator the graph has."""
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))


def passes_for(fuse: str, branches: Sequence[Branch], checkpoint: Checkpoint) -> list[ir.passes.InPlacePass]:
    """The passes of a fusion level, in order."""
    order: list[ir.passes.InPlacePass] = [Attach(branches, checkpoint)]  # first: it makes what the others fuse
    if fuse == "both":
        order.append(FoldNeurons(branches))  # before the next two, which would spend a Split and a Concat on the same branches
    if fuse in ("forward", "both"):
        order.append(FuseForward(branches))
    if fuse in ("backward", "both"):
        order.append(FuseBackward(branches))
    return order


def run_passes(model: ir.Model, passes: Sequence[ir.passes.InPlacePass]) -> None:
    """Run passes in place, and hold the graph's inputs and outputs to their names, types and shapes.

    Raises:
        FusionError: an assumption or a promise of a pass does not hold; the message names the block.
    """
    before = _interface(model)
    for pass_ in passes:
        try:
            pass_(model)
        except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
            if isinstance(error.__cause__, FusionError):
                raise error.__cause__ from error
            raise FusionError(f"{type(pass_).__name__}: {error.__cause__ or error}") from error
        if _interface(model) != before:
            raise FusionError(f"{type(pass_).__name__} changed the graph's inputs or outputs")


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(v.name, str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
