"""An artifact's graph changed in memory for a comparison: its adapter silenced, or its blocks' results made outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from flora_export.artifact import Artifact
from flora_export.backends import check_can_be_silenced
from flora_export.branch import Branch
from flora_export.manifest import LedgerEntry
from flora_export.quantization.packing import read_form

_DEQUANTIZING = ("Convert", "Subtract", "Multiply", "Reshape")


def silence(model: ov.Model, artifact: Artifact) -> None:
    """What is fed to B's rows of a weight is multiplied by zero. Raises FloraExportError where the adapter is in the base's weights."""
    check_can_be_silenced(artifact)
    constants = constants_of(model)
    for entry in artifact.manifest.ledger:
        if entry.origin != "adapter" or entry.initializer not in constants:
            continue
        for product in products_of(constants[entry.initializer]):
            rows = _rows_of(entry)
            if rows is None:
                continue
            x, weight = product.input_value(0), product.input_value(1)
            mask = np.ones(list(weight.get_shape())[1 if product.get_attributes()["transpose_b"] else 0], x.get_element_type().to_dtype())
            mask[slice(*rows)] = 0
            product.input(0).replace_source_output(op.multiply(x, op.constant(mask)).output(0))
    model.validate_nodes_and_infer_types()


def exposed(file: Path, branches: Sequence[Branch]) -> tuple[ov.Model, dict[str, str]]:
    """A graph with every block's result as an output, and the names of these by block."""
    model = ov.Core().read_model(file)
    constants, names = constants_of(model), {}
    for branch in branches:
        found = list(products_of(constants[branch.writes[0]])) if branch.writes and branch.writes[0] in constants else []
        if len(found) == 1:
            value = _block_output(found[0].output(0))
            names[branch.block] = f"{branch.block}.result"
            value.get_tensor().add_names({names[branch.block]})
            model.add_outputs(names[branch.block])
    return model, names


def constants_of(model: ov.Model) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


def products_of(constant: Any) -> Iterator[Any]:
    """The MatMuls that multiply by a constant, whatever makes floating-point numbers of it."""
    for reader in _readers(constant.output(0)):
        if reader.get_type_name() == "MatMul":
            yield reader
        elif reader.get_type_name() in _DEQUANTIZING:
            yield from products_of(reader)


def _rows_of(entry: LedgerEntry) -> tuple[int, int] | None:
    """The rows of a weight [in, out] that a B fills; None where the entry is no B: what fills columns is an A."""
    if not entry.form:
        return (entry.start, entry.stop) if entry.axis == 0 else None
    form = read_form(entry.form)
    if form.axis(entry.axis) != 0 or form.content != "codes":
        return None
    return entry.start * form.block_size, entry.stop * form.block_size


def _block_output(value: Any) -> Any:
    """What the block returns: its last projection's product, after its bias and what an unfused adapter adds."""
    while True:
        readers = _readers(value)
        if len(readers) == 1 and readers[0].get_friendly_name().endswith(".detour_split"):
            value = readers[0].output(0)
            continue
        if len(readers) != 1 or readers[0].get_type_name() != "Add":
            return value
        (add,) = readers
        bias = any(source.get_node().get_type_name() == "Constant" for source in add.input_values())
        if not bias and not add.get_friendly_name().endswith((".ffba_add", ".detour_add")):
            return value  # the residual: no longer the block
        value = add.output(0)


def _readers(value: Any) -> list[Any]:
    return [place.get_node() for place in value.get_target_inputs()]
