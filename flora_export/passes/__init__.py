"""The passes and their order. Each is pure graph algebra; together they are the whole compiler."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from flora_export.bank import COLUMNS, STACK
from flora_export.base_model import BaseModel
from flora_export.branch import Branch, Detour
from flora_export.capture import Capture
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.passes.attach import Attach
from flora_export.passes.attach_detours import AttachDetours, place_detours
from flora_export.passes.bank import ReadAdapterIds, SelectAdapters, beside_each_other
from flora_export.passes.change_weights import ChangeWeights
from flora_export.passes.choose_rotary import ChooseRotary
from flora_export.passes.fold_neurons import FoldNeurons
from flora_export.passes.fuse_backward import FuseBackward
from flora_export.passes.fuse_forward import FuseForward
from flora_export.passes.hosts import find_hosts
from flora_export.passes.lower_attention import LowerAttention
from flora_export.passes.quantize import Quantize
from flora_export.quantization import Quantization
from flora_export.weights import dims_of

# Forms whose compiler makes one GEMM of projections that read the same x: there, forward fusion would add a slice and bring nothing.
MERGES_SIBLINGS = {"tensorrt": "A: TensorRT itself merges it into its hosts"}

# Forms that are lowered, and the precisions in which their compiler has no operator for attention.
WITHOUT_ATTENTION = {"tensorrt": (ir.DataType.FLOAT,), "openvino": (), "qnn": (ir.DataType.FLOAT, ir.DataType.FLOAT16)}

# The passes that bring the adapter into the graph; they come before those that fuse it.
ENTERING = (ChangeWeights, Attach, AttachDetours)


@dataclass(frozen=True)
class Fused:
    """A captured base model with its adapter in the graph, and how it got there: what a backend is given."""

    capture: Capture
    base: BaseModel
    checkpoint: Checkpoint
    branches: tuple[Branch, ...]  # with their hosts
    fuse: str
    align: int
    cache_tokens: int
    passes: tuple[str, ...]
    operators_before: dict[str, int]
    quantization: Quantization | None = None

    @property
    def precision(self) -> str:
        return self.capture.precision if self.quantization is None else self.quantization.precision

    detours: tuple[Detour, ...] = ()  # with their hosts

    @property
    def model(self) -> ir.Model:
        return self.capture.model


def fuse_adapter(
    capture: Capture,
    base: BaseModel,
    checkpoint: Checkpoint,
    fuse: str,
    *,
    align: int = 1,
    cache_tokens: int = 0,
    quantization: Quantization | None = None,
) -> Fused:
    """Attach the adapter to the captured graph, fuse it to a level, and quantize what is to be, in place.

    Args:
        align: ranks are padded with zeros to a multiple of it.
        cache_tokens: places of a static KV cache, where the form of the capture can have one; 0 for a cache that grows.

    Raises:
        FusionError: a branch cannot be attached or fused; the message names it. Or a merged weight is to be quantized that another machine
            merges to other bits, so that its codes could not be derived anew.
    """
    inexact = [change for change in checkpoint.changes if not change.exact]
    if quantization is not None and inexact:
        raise FusionError(
            f"{inexact[0].tensor}: {inexact[0].what}, has other last bits on other machines, and {quantization.precision} codes "
            "with them: they could not be proved. Build it in fp32 or fp16."
        )
    if quantization is not None and checkpoint.bank is not None:
        if quantization.adapter_bits not in (0, quantization.bits):
            raise FusionError("adapters of a bank keep their precision: leave out --adapter-precision")
        quantization = dataclasses.replace(quantization, adapter_bits=0)
    lowered = lowering(capture.form, cache_tokens)  # first: what follows then sees what the target sees
    lowered = run_passes(capture.model, lowered)
    before = operator_counts(capture.model)
    if (quantization is not None and not quantization.fusable) or (checkpoint.bank is not None and checkpoint.bank.layout == STACK):
        fuse = "none"  # what a row gathers is its own
    branches = place_branches(capture.model, checkpoint, base, align, fuse, quantization)
    detours = place_detours(capture.model, checkpoint, base)
    if detours and quantization is not None and quantization.adapter_bits:
        raise FusionError(
            f"{detours[0].tensor}: a LoRA beside a quantized weight keeps its precision. Pass --adapter-precision keep, or --merge."
        )
    passes = passes_for(fuse, branches, checkpoint, capture.form, base, quantization, detours, align)
    run_passes(capture.model, passes)
    names = tuple(type(pass_).__name__ for pass_ in lowered + passes)
    return Fused(capture, base, checkpoint, branches, fuse, align, cache_tokens, names, before, quantization, detours)


def place_branches(
    model: ir.Model, checkpoint: Checkpoint, base: BaseModel, align: int, fuse: str, quantization: Quantization | None = None
) -> tuple[Branch, ...]:
    """The adapter's branches with their hosts in a graph, padded: beside their rank, and to a block of their own below the host's rows."""
    branches = checkpoint.branches if checkpoint.bank is None else beside_each_other(checkpoint.branches, checkpoint.bank)
    padded = [dataclasses.replace(branch, padding=-branch.rank % align) for branch in branches]
    placed = find_hosts(model, padded, base.width)
    if quantization is None or fuse not in ("backward", "both"):
        return placed
    rows = {branch.block: dims_of(model.graph.initializers[branch.writes[0]])[0] for branch in placed}
    return tuple(dataclasses.replace(branch, lead=-rows[branch.block] % quantization.block_size) for branch in placed)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator the graph has."""
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))


def passes_for(
    fuse: str,
    branches: Sequence[Branch],
    checkpoint: Checkpoint,
    form: str = "cpu",
    base: BaseModel | None = None,
    quantization: Quantization | None = None,
    detours: Sequence[Detour] = (),
    align: int = 1,
) -> list[ir.passes.InPlacePass]:
    """The passes of a fusion level, in order, for a form of the capture. A checkpoint that changes weights needs the base model."""
    order: list[ir.passes.InPlacePass] = []
    if checkpoint.bank is not None:
        order.append(ReadAdapterIds(checkpoint.bank, form))
    if checkpoint.changes:
        assert base is not None
        order.append(ChangeWeights(checkpoint, base))  # before what widens weights: it knows them as the capture has made them
    if branches:
        order.append(Attach(branches, checkpoint))  # it makes what the others fuse
    if detours:
        order.append(AttachDetours(detours, checkpoint, align))
    if branches and fuse == "both":
        order.append(FoldNeurons(branches))  # before the next two, which would spend a Split and a Concat on the same branches
    merges = form in MERGES_SIBLINGS and quantization is None  # integers it leaves apart
    if (branches or detours) and (fuse == "forward" or (fuse == "both" and not merges)):
        order.append(FuseForward(branches, detours))
    if branches and fuse in ("backward", "both"):
        order.append(FuseBackward(branches))
    if checkpoint.bank is not None and checkpoint.bank.layout == COLUMNS:
        order.append(SelectAdapters(checkpoint.bank))  # last, so that the others see what they know
    if quantization is not None:
        order.append(Quantize(quantization, base.packed if base is not None else None))  # the others know floating-point weights alone
    return order


def lowering(form: str, cache_tokens: int = 0) -> list[ir.passes.InPlacePass]:
    """The passes that a form of the capture needs before it is what its name says, adapter or not."""
    if form in WITHOUT_ATTENTION:
        return [LowerAttention(cache_tokens, spelled_out=WITHOUT_ATTENTION[form])]
    return [ChooseRotary()] if form in ("cpu", "cuda") else []


def run_passes(model: ir.Model, passes: Sequence[ir.passes.InPlacePass]) -> list[ir.passes.InPlacePass]:
    """Run passes in place, and hold the graph's inputs and outputs to their names, types and shapes. Returns those that changed the graph.

    Raises:
        FusionError: an assumption or a promise of a pass does not hold; the message names the block.
    """
    changed = []
    for pass_ in passes:
        before = _interface(model)
        try:
            if pass_(model).modified:
                changed.append(pass_)
        except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
            if isinstance(error.__cause__, FusionError):
                raise error.__cause__ from error
            raise FusionError(f"{type(pass_).__name__}: {error.__cause__ or error}") from error
        promised = isinstance(pass_, ReadAdapterIds) or (isinstance(pass_, LowerAttention) and pass_.cache_tokens)
        if _interface(model) != before and not promised:
            raise FusionError(f"{type(pass_).__name__} changed the graph's inputs or outputs")
    return changed


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(v.name, str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
