"""The lowered graph in ONNX Runtime on the CPU: the numeric proof of an engine's graph where there is no GPU to run the engine."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime as ort

from flora_export.artifact import Artifact
from flora_export.backends.edited import edited_graph
from flora_export.backends.onnxruntime import Decoder


class PortableDecoder(Decoder):
    """`model.onnx` of an artifact for TensorRT, on the CPU.

    ONNX Runtime's CPU kernels have no bfloat16: a bf16 graph is run in fp32, with its bf16 weights. That proves the graph and the weights,
    not bf16's own rounding.
    """

    def __init__(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, graph: bytes | None = None) -> None:
        arithmetic = ""
        if artifact.manifest.precision == "bf16":
            source = graph or edited_graph(artifact, adapter=adapter)
            graph = ir.to_proto(in_fp32(ir.from_proto(onnx.load_model_from_string(source)))).SerializeToString()
            arithmetic = ", in fp32 with bf16 weights"
        super().__init__(artifact, adapter=adapter, threads=threads, graph=graph, provider="CPUExecutionProvider")
        self.runtime = f"ONNX Runtime {ort.__version__} on the CPU, the lowered graph{arithmetic}; the engine itself was not run"


def in_fp32(model: ir.Model) -> ir.Model:
    """A bf16 graph that computes in fp32: its weights are cast as they are read, its inputs and outputs become fp32."""
    graph = model.graph
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    casts = []
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.cast")
            cast.outputs[0].name = f"{value.name}.fp32"
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)  # the line above has redirected this use as well
            casts.append(cast)
    first = next(iter(graph))
    graph.insert_before(first, casts)
    return model
