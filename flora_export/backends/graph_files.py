"""A fused graph as files, and what runtimes need beside it: for every backend whose artifact holds the graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from flora_export.backends import Progress
from flora_export.backends.manifest import describe
from flora_export.ledger import block_records, write_model
from flora_export.manifest import Manifest, Tensor
from flora_export.passes import Fused

COPIED = ("config.json", "generation_config.json", "chat_template.jinja")


def write_graph(fused: Fused, directory: Path, backend: str, target: str, progress: Progress) -> Manifest:
    """Write the model and what runtimes need beside it, for any backend whose artifact holds the graph."""
    model, base = fused.model, fused.base
    blocks = block_records(fused)
    ledger = write_model(model, directory, lambda done, of: progress("writing", done, of))
    fused.capture.write_runtime_files(base, directory, target)
    for name in COPIED:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, directory / name)
    grouped = any(node.op_type == "GroupQueryAttention" for node in model.graph)
    return describe(
        fused,
        backend=backend,
        target=target,
        padding="right" if grouped or fused.cache_tokens else "left",
        versions={"onnxruntime": ort.__version__},
        inputs=[describe_value(value) for value in model.graph.inputs],
        outputs=[describe_value(value) for value in model.graph.outputs],
        blocks=blocks,
        ledger=ledger,
    )


def describe_value(value: ir.Value) -> Tensor:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    return Tensor(value.name, value.dtype.name, [d if isinstance(d, int) else str(d) for d in value.shape])
