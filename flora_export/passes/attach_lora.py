"""AttachLora: an unmerged LoRA beside every projection of every block. A rival for the benchmark: it is measured, never exported.

    before   x ── W ── y
    after    x ─┬─ W ─────────── y ── Add ── y'
                └─ A ── B ────────────┘

In its strongest form: a weight that packs n projections stays packed, with one GEMM for all their A and one for all their B.

    [x A1 B1, x A2 B2, x A3 B3] = x [A1 A2 A3] [B1 0 0; 0 B2 0; 0 0 B3]

Latency does not depend on the numbers, so they are random, small and the same in every run; the scale is left out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.branch import BLOCK_KINDS, Branch
from flora_export.errors import FusionError
from flora_export.passes.hosts import find_hosts, host_node, projections
from flora_export.weights import Array, Part, Stacked, dims_of

_PACKED = re.compile(r"(?P<names>.+)__axis_0__concat_t")  # as the capture names a weight that it has packed


@dataclass(frozen=True)
class LoraHost:
    """A weight [in, out] of the graph, and how many columns each projection has that is packed in it."""

    weight: str
    inputs: int
    columns: tuple[int, ...]

    @property
    def parameters_per_rank(self) -> int:
        """Trainable numbers of A and B for each unit of rank; the zeros of a block-diagonal B are none."""
        return len(self.columns) * self.inputs + sum(self.columns)


def lora_hosts(model: ir.Model, base: BaseModel, layers: str = "model.layers") -> tuple[LoraHost, ...]:
    """All linear projections of the attention and the MLP of every layer. `layers` is the name of the list of layers.

    Raises:
        FusionError: a block has no such projections, or a packed weight has other columns than the base model's heads make up.
    """
    blocks = [(f"{layers}.{layer}.{name}", kind) for layer in range(base.layers) for name, kind in BLOCK_KINDS.items()]
    hosts = []
    for branch in find_hosts(model, [Branch(block, kind, "identity", 1, 1.0) for block, kind in blocks], base.width):
        split: dict[str, list[int]] = {}  # a packed gate and up projection comes in halves
        for projection in projections(model, branch):
            split.setdefault(projection.weight.name or "", []).append(projection.size)
        for name in (*branch.reads, *branch.writes):
            inputs, outputs = dims_of(model.graph.initializers[name])
            columns = _packed_columns(name, base, outputs) or tuple(split.get(name, [outputs]))
            hosts.append(LoraHost(name, inputs, columns))
    return tuple(hosts)


def lora_parameters(hosts: Sequence[LoraHost], rank: int) -> int:
    """Trainable numbers of a LoRA on these hosts."""
    return rank * sum(host.parameters_per_rank for host in hosts)


def _packed_columns(name: str, base: BaseModel, outputs: int) -> tuple[int, ...]:
    """Columns of each projection in a weight that the capture has packed: q, k and v, or gate and up. Empty where it is not packed."""
    match = _PACKED.fullmatch(name)
    if match is None:
        return ()
    names = match["names"].split("__")
    if len(names) == 3:
        heads = int(base.config["num_attention_heads"])
        size = int(base.config.get("head_dim") or base.width // heads)
        key_heads = int(base.config.get("num_key_value_heads") or heads)
        columns: tuple[int, ...] = (heads * size, key_heads * size, key_heads * size)
    else:
        columns = (outputs // len(names),) * len(names)
    if sum(columns) != outputs:
        raise FusionError(f"{name} has {outputs} columns, but the base model's configuration makes them {' + '.join(map(str, columns))}")
    return columns


class AttachLora(ir.passes.InPlacePass):
    """Adds, per host, the nodes `{weight}.lora_A`, `.lora_B` and `.lora_add`."""

    def __init__(self, hosts: Sequence[LoraHost], rank: int, seed: int = 0) -> None:
        self.hosts, self.rank, self.seed = hosts, rank, seed

    def requires(self, model: ir.Model) -> None:
        for host in self.hosts:
            host_node(model, host.weight)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = [host for host in self.hosts if f"{host.weight}.lora_A" not in model.graph.initializers]
        for host in waiting:
            self._attach_one(model, host)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for host in self.hosts:
            (total,) = [node for node, _ in host_node(model, host.weight).outputs[0].uses()]
            if total.name != f"{host.weight}.lora_add":
                raise FusionError(f"{host.weight}: LoRA was not attached")

    def _attach_one(self, model: ir.Model, host: LoraHost) -> None:
        node = host_node(model, host.weight)
        x, y = node.inputs[0], node.outputs[0]
        dtype = model.graph.initializers[host.weight].dtype
        assert x is not None and dtype is not None
        n, outputs = len(host.columns), sum(host.columns)
        starts = [sum(host.columns[:index]) for index in range(n)]
        down = [self._part(f"{host.weight}.lora_A{i}", dtype, (host.inputs, self.rank)) for i in range(n)]
        up = [
            self._part(f"{host.weight}.lora_B{i}", dtype, (self.rank, columns), start, outputs)
            for i, (start, columns) in enumerate(zip(starts, host.columns, strict=True))
        ]
        a = _matmul(model, x, Stacked(f"{host.weight}.lora_A", down, 1, dtype, [host.inputs]))  # [in, n r]
        b = _matmul(model, a.outputs[0], Stacked(f"{host.weight}.lora_B", up, 0, dtype, [outputs]))  # [n r, out], block-diagonal
        total = ir.node("Add", [y, b.outputs[0]], name=f"{host.weight}.lora_add")
        total.outputs[0].name = f"{host.weight}.lora_add.out"
        y.replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, y)  # the line above has redirected this use of y as well
        model.graph.insert_after(node, [a, b, total])

    def _part(self, name: str, dtype: ir.DataType, shape: tuple[int, int], start: int = 0, outputs: int | None = None) -> Part:
        """Random numbers of a shape, at column `start` of `outputs`, zeros around them."""
        return Part(name, "adapter", self.rank, 1.0, _reader(self.seed, name, dtype, shape, start, outputs or shape[1]))


def _reader(seed: int, name: str, dtype: ir.DataType, shape: tuple[int, int], start: int, outputs: int) -> Callable[[], Array]:
    def read() -> Array:
        values = np.zeros((shape[0], outputs), np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values[:, start : start + shape[1]] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return values.astype(dtype.numpy())

    return read


def _matmul(model: ir.Model, source: ir.Value, tensor: Stacked) -> ir.Node:
    weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(weight)
    node = ir.node("MatMul", [source, weight], name=tensor.name)
    node.outputs[0].name = f"{tensor.name}.out"
    return node
