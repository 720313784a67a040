"""What a capture derives from the configuration is as exact as its precision allows: no constant is rounded on the way.

Widths and head sizes whose roots have no end: a root with few digits hides a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.capture_constants import SCALE
from tests.families import FAMILIES, SHAPE

WIDTH, HEAD, HEADS = 80, 48, 5
UNEVEN: dict[str, Any] = SHAPE | {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1}
NARROW = UNEVEN | {"num_key_value_heads": HEADS}  # heads of 16, the width's share
GEMMA = {"head_dim": HEAD, "query_pre_attn_scalar": 24, "sliding_window": 128}
KINDS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "gemma": lambda: tf.GemmaConfig(**UNEVEN, head_dim=HEAD),
    "gemma2": lambda: tf.Gemma2Config(**UNEVEN, **GEMMA, attn_logit_softcapping=47.3, final_logit_softcapping=29.7),
    "gemma3": lambda: tf.Gemma3TextConfig(**UNEVEN, **GEMMA, layer_types=KINDS),
    "llama": lambda: tf.LlamaConfig(**UNEVEN, head_dim=HEAD),
    "qwen3": lambda: tf.Qwen3Config(**UNEVEN, head_dim=HEAD),
    "mistral": lambda: tf.MistralConfig(**UNEVEN, head_dim=HEAD, sliding_window=None),
    "phi3": lambda: tf.Phi3Config(**NARROW),
    "starcoder2": lambda: tf.Starcoder2Config(**NARROW),
    "granite": lambda: tf.GraniteConfig(
        **NARROW, embedding_multiplier=11.7, residual_multiplier=0.22, attention_multiplier=0.0173, logits_scaling=7.3
    ),
}
ATTENTION_SCALE = {"gemma2": 24**-0.5, "gemma3": 24**-0.5, "phi3": 0.25, "starcoder2": 0.25, "granite": 0.0173}
FORMS = [("cpu", "fp32"), ("cuda", "bf16"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "bf16")]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("uneven")

    def get(family: str) -> Path:
        if not (root / family).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(root / family)
        return root / family

    return get


def _scalars(graph: ir.Graph) -> list[tuple[str, ir.DataType, float]]:
    """(operator that reads it, type, value) of each floating-point constant of one element."""
    return [
        (node.op_type, value.const_value.dtype, float(value.const_value.numpy()))
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.size == 1 and value.const_value.dtype.is_floating_point()
        for node, _ in value.uses()
    ]


@pytest.mark.parametrize(("form", "precision"), FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_constant_is_the_configurations(family: str, form: str, precision: str, uneven: Callable[[str], Path]) -> None:
    base = load_base(str(uneven(family)))
    graph = capture(base, form, precision).model.graph
    config = base.config
    stated = {
        "Mul": [config[key] for key in ("embedding_multiplier", "residual_multiplier", "final_logit_softcapping") if config.get(key)],
        "Div": [config[key] for key in ("logits_scaling", "final_logit_softcapping") if config.get(key)],
        "Add": [1.0],  # norms that are stored as their difference from 1
    }
    if family.startswith("gemma"):
        stated["Mul"].append(math.sqrt(WIDTH))
    found: dict[str, set[float]] = {"Mul": set(), "Div": set()}
    for operator, dtype, value in _scalars(graph):
        if operator == "Where":  # the ends of the mask's range
            continue
        assert value in {float(np.array(exact, dtype.numpy())) for exact in stated[operator]}, f"{operator} by {value}"
        found.setdefault(operator, set()).add(value)
    assert {operator: len(found[operator]) for operator in ("Mul", "Div")} == {key: len(stated[key]) for key in ("Mul", "Div")}


@pytest.mark.parametrize(("form", "precision"), FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_attribute_is_the_configurations(family: str, form: str, precision: str, uneven: Callable[[str], Path]) -> None:
    base = load_base(str(uneven(family)))
    attentions = norms = 0
    for node in capture(base, form, precision).model.graph:
        attributes = {name: attribute.as_float() for name, attribute in node.attributes.items() if attribute.type == ir.AttributeType.FLOAT}
        if "Attention" in node.op_type:
            attentions += 1
            assert np.float32(attributes["scale"]) == np.float32(ATTENTION_SCALE.get(family, HEAD**-0.5))
            assert attributes.get("softcap", 0.0) == (base.config.get("attn_logit_softcapping") or 0.0)
        elif "epsilon" in attributes:
            norms += 1
            assert attributes == {"epsilon": base.config.get("rms_norm_eps", base.config.get("norm_epsilon"))}
    assert attentions == 2
    assert norms >= 5


def test_a_root_without_rounding_is_left_alone(bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "even", lambda: tf.Gemma3TextConfig(**SHAPE, head_dim=16))
    graph = capture(load_base(str(bases("even"))), "cpu", "fp32").model.graph  # d = 64
    assert SCALE not in graph.initializers
    assert ("Mul", ir.DataType.FLOAT, 8.0) in _scalars(graph)


def test_the_rounded_factor_leaves_the_graph(uneven: Callable[[str], Path]) -> None:
    graph = capture(load_base(str(uneven("gemma3"))), "cpu", "fp32").model.graph
    assert [value for operator, _, value in _scalars(graph) if operator == "Mul"] == [float(np.float32(math.sqrt(WIDTH)))]
    assert all(value.uses() for value in graph.initializers.values())
