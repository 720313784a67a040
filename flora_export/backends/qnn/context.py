"""Contexts from the portable graph: `prefill.onnx` and `decode.onnx`, each one EPContext node, and the binaries that they name.

Two builds of a tiny model differed in some 60 bytes of a binary: QNN pads a constant with what its memory held before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from flora_export.artifact import MODEL
from flora_export.backends.qnn.apart import run_apart
from flora_export.backends.qnn.plan import ContextPlan
from flora_export.backends.qnn.static import fix_shapes
from flora_export.errors import BackendError

GRAPHS = ("prefill", "decode")
CONTEXTS = ("prefill.onnx", "decode.onnx", "prefill_qnn.bin", "decode_qnn.bin")  # ONNX Runtime names the binaries; shared, there is one


@dataclass(frozen=True)
class Compiled:
    """What has been written, and with what."""

    sdk: str  # QNN's own version
    seconds: dict[str, float]  # by graph
    operators: dict[str, dict[str, int]]  # QNN's, by graph, before the HTP's own compiler changes them


@contextmanager
def static_graphs(directory: Path, tokens: int) -> Iterator[list[Path]]:
    """`model.onnx` of a directory as two graphs of fixed shapes, beside the weights that they read, while the block runs."""
    files = []
    try:
        for name, count in zip(GRAPHS, (tokens, 1), strict=True):
            model = ir.load(directory / MODEL)
            fix_shapes(model, count)
            files.append(directory / f".{name}.static.onnx")
            ir.save(model, files[-1])
        yield files
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def compile_contexts(source: Path, directory: Path, plan: ContextPlan) -> Compiled:
    """Compile the `model.onnx` of a directory into another, which may be the same.

    Raises:
        BackendError: QNN refuses; or more than one node is left of a graph.
    """
    for name in CONTEXTS:  # ONNX Runtime writes over none
        (directory / name).unlink(missing_ok=True)
    with static_graphs(source, plan.prompt_tokens) as graphs:
        named = dict(zip(GRAPHS, (graph.name for graph in graphs), strict=True))
        answer = run_apart(task_of(directory, plan) | {"graphs": named}, source)
    versions = [_checked(directory / f"{name}.onnx") for name in GRAPHS]
    made = answer["made"]
    return Compiled(versions[0], *({name: made[name][key] for name in GRAPHS} for key in ("seconds", "operators")))


def task_of(directory: Path, plan: ContextPlan) -> dict[str, object]:
    """What host.py needs to know of a directory's contexts."""
    chip = {"soc_model": plan.soc_model, "htp_arch": plan.htp_arch}
    return {"directory": str(directory.absolute()), "share": plan.share_weights, **chip}


def binaries(directory: Path) -> dict[str, int]:
    """The files of a directory's contexts, with their bytes."""
    return {name: (directory / name).stat().st_size for name in CONTEXTS if (directory / name).is_file()}


def unshared(plan: ContextPlan) -> ContextPlan:
    """The same with a binary for each graph, which the simulator can load."""
    return dataclasses.replace(plan, share_weights=False)


def _checked(file: Path) -> str:
    """QNN's version, from a graph that is one EPContext node, whose binary is there. Raises BackendError where it is not."""
    if not file.is_file():
        raise BackendError(f"QNN has written no {file.name}")
    nodes = list(ir.load(file).graph)
    left = [f"{node.name} ({node.op_type})" for node in nodes if node.op_type != "EPContext"]
    if left or len(nodes) != 1:
        raise BackendError(f"{file.name} is not one context but {len(nodes)} nodes, and leaves to the CPU: {', '.join(left[:5]) or 'none'}")
    binary = file.parent / nodes[0].attributes["ep_cache_context"].as_string()
    if not binary.is_file() or not binary.stat().st_size:
        raise BackendError(f"{file.name} names {binary.name}, which is not there")
    return nodes[0].attributes["ep_sdk_version"].as_string()
