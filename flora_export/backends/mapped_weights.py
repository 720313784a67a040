"""ONNX Runtime on a CPU, the weights of an artifact mapped as they lie in its files: for those that would not fit into memory."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
import onnxruntime as ort


def keep_weights_mapped(options: ort.SessionOptions) -> None:
    """Run the graph as it is: nothing is packed or, for a CPU without fp16, cast ahead; sessions share the memory that a run needs.

    A weight is cast just before the node that multiplies it. In ONNX Runtime's own order all casts come first: the whole model in fp32.
    """
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_mem_pattern = False
    _share_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _share_memory() -> None:
    """One arena for all sessions of this process that ask for it: every run casts each weight, and new memory for that takes longest."""
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"arena_extend_strategy": 1}))  # by what is asked for, not by powers of two


def giving_back() -> ort.RunOptions:
    """A run that leaves nothing of its own in the arena: what is kept beside it would lie in the piece of the largest weight, and the next
    run would need another.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def multiply_tables_as_they_lie(graph: bytes) -> bytes:
    """x Tᵀ as one product, where a graph transposes a table first: a tied head, the size of the embeddings, which no run need turn anew."""
    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    for node in list(model.graph):
        turned = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if turned is None or turned.op_type != "Transpose" or turned.inputs[0] is None or not turned.inputs[0].is_initializer():
            continue
        node.op_type, node.domain = "FusedMatMul", "com.microsoft"
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
        node.replace_input_with(1, turned.inputs[0])
        model.opset_imports.setdefault(node.domain, 1)
        if not turned.outputs[0].uses():
            model.graph.remove(turned, safe=True)
    edited: bytes = ir.to_proto(model).SerializeToString()
    return edited
