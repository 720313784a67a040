"""Constants that mobius 0.1.0 rounds on the way, put right in a captured graph.

    before   ids ── Gather(embeddings) ── Mul(sqrt(d), rounded) ── x
    after    ids ── Gather(embeddings) ── Mul(sqrt(d)) ── x

Gemma multiplies its embeddings by sqrt(d). mobius rounds that to two decimals (Gemma 1 and 2) or to fp16 (Gemma 3), whatever the graph's
own precision is: for d = 640 it is off by 5e-5, 900 units of fp32's rounding. The residual stream adds what the layers return to the
embeddings, so no norm takes it back: Gemma-3-270M's logits were off by 40 to 60 times what eager fp32 is off by. transformers rounds the
factor once, to the precision of the weights, and so does this. A root with few digits (d = 576, 1024, 2304) was exact all along.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from flora_export.base_model import BaseModel

SCALE = "model.embed_tokens.scale"
# How far a rounded factor is from sqrt(d) at most, d being 64 or more: two decimals are off by 6e-4 then, and bfloat16 by 2e-3.
_ROUNDED = 2.0**-8


def mend_embedding_scale(model: ir.Model, base: BaseModel) -> bool:
    """Make the factor of the embeddings exact where it is sqrt(d), rounded; returns whether it was not.

    A factor that the configuration states itself (Granite's `embedding_multiplier`) is copied by mobius as it stands, and left alone.
    """
    if "embedding_multiplier" in base.config:
        return False
    exact = math.sqrt(base.width)
    for node in model.graph:
        if node.op_type != "Mul" or not _is_embedding(node.inputs[0]):
            continue
        factor = node.inputs[1]
        if factor is None or factor.const_value is None or factor.const_value.size != 1 or factor.dtype is None:
            continue
        found = float(factor.const_value.numpy())
        values = np.array(exact, factor.dtype.numpy())
        if found == float(values) or abs(found / exact - 1.0) > _ROUNDED:
            continue
        tensor = ir.Tensor(values, dtype=factor.dtype, name=SCALE)
        mended = ir.Value(name=SCALE, shape=tensor.shape, type=ir.TensorType(factor.dtype), const_value=tensor)
        model.graph.initializers.add(mended)
        node.replace_input_with(1, mended)
        if not factor.uses() and factor.name is not None:  # mobius makes one initializer of equal constants
            del model.graph.initializers[factor.name]
        return True
    return False


def _is_embedding(value: ir.Value | None) -> bool:
    """Whether a value is the rows of a table that the graph's input_ids name."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Gather":
        return False
    table, ids = node.inputs[:2]
    return table is not None and table.is_initializer() and ids is not None and ids.name == "input_ids"
