"""The stacks of a bank as inputs of its engine: what is no weight of an engine can be replaced without building, or refitting, it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from flora_export.artifact import MODEL
from flora_export.backends.graph_files import describe_value
from flora_export.manifest import Manifest, Tensor
from flora_export.passes.attach import weight_name
from flora_export.stacks import matrices_of

OPEN = ".open.onnx"


@contextlib.contextmanager
def opened(directory: Path, manifest: Manifest) -> Iterator[tuple[Path, Sequence[Tensor]]]:
    """The graph that an engine is built from, and its inputs: that of the artifact, its stacks as inputs while the block runs."""
    names = [weight_name(branch, matrix) for branch, matrix in matrices_of(manifest)]
    if not names:
        yield directory / MODEL, manifest.inputs
        return
    model = ir.load(directory / MODEL)
    stacks = [model.graph.initializers.pop(name) for name in names]
    for value in stacks:
        value.const_value = None
        model.graph.inputs.append(value)
    file = directory / OPEN
    try:
        ir.save(model, file)
        yield file, [*manifest.inputs, *map(describe_value, stacks)]
    finally:
        file.unlink(missing_ok=True)
