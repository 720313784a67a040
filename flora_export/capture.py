"""Base model -> `onnx_ir.Model`. The only file that knows mobius."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.capture_constants import mend_embedding_scale
from flora_export.errors import BackendError, CheckpointError

# The forms in which a base model is captured, and the precisions of each: precision -> mobius dtype. `cpu` and `cuda` hold what ONNX
# Runtime's provider of that name can run (the CPU provider has no bfloat16 MatMul). The others hold operators of the ONNX standard alone:
# `tensorrt` is still to be lowered (passes/lower_attention.py); `weights` says how projections hang together, and is never run.
PRECISIONS: dict[str, dict[str, str]] = {
    "cpu": {"fp32": "f32", "fp16": "f16"},
    "cuda": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
    "tensorrt": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
    "weights": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
}


WINDOW = "flora_export.sliding_window"  # metadata of an Attention node: how many tokens it sees, its own included


@dataclass(frozen=True)
class Capture:
    """The base model as a graph whose weights are read when they are needed, with mobius's package for its configuration."""

    model: ir.Model
    form: str
    precision: str
    package: Any

    def write_runtime_files(self, base: BaseModel, directory: Path, provider: str) -> None:
        """Write `genai_config.json`, for an execution provider of ONNX Runtime, and the tokenizer's files into a directory."""
        from mobius.integrations.ort_genai.auto_export import write_ort_genai_config

        try:
            with _quiet():
                write_ort_genai_config(
                    self.package,
                    str(directory),
                    ep=provider,
                    context_length=base.context,
                    local_config_dir=str(base.path),
                )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"base model {base.name}: its configuration and tokenizer make no genai_config.json ({type(error).__name__}: {error})"
            ) from error


def capture(base: BaseModel, form: str, precision: str) -> Capture:
    """Capture a base model in one of the forms of PRECISIONS.

    Raises:
        BackendError: mobius is missing, or the form cannot have that precision.
        CheckpointError: mobius cannot capture this model; its own words are quoted.
    """
    if precision not in PRECISIONS[form]:
        raise BackendError(
            f"precision {precision} does not run on target {form} in ONNX Runtime; it has {', '.join(PRECISIONS[form])}. "
            "For bf16 and fp16 on a GPU, use --target cuda."
        )
    try:
        with _quiet():
            import mobius

            provider = form if form in ("cpu", "cuda") else "onnx-standard"
            package = mobius.build(str(base.path), execution_provider=provider, dtype=PRECISIONS[form][precision])
    except ImportError as error:
        raise BackendError(
            f"mobius, which captures the base model, cannot be imported ({error}): pip install 'flora-export[cpu]'"
        ) from error
    except Exception as error:  # mobius documents no error types
        raise CheckpointError(
            f"base model {base.name}: mobius cannot capture a {base.config.get('model_type')!r} model ({type(error).__name__}: {error})"
        ) from error
    if set(package) != {"model"}:
        raise CheckpointError(f"base model {base.name}: not one decoder, but {', '.join(package)}; only text decoders are supported")
    model: ir.Model = package["model"]
    empty = sorted(name for name, value in model.graph.initializers.items() if value.const_value is None)
    if empty:
        raise CheckpointError(
            f"base model {base.name}: {len(empty)} of its weights are missing, first {empty[0]}. Is its download complete?"
        )
    if form != "weights":  # nobody runs its attention
        _mend_attention(model, base, form, PRECISIONS[form][precision])
        mend_embedding_scale(model, base)
    model.graph.name = "model"  # mobius puts the path of the base model here, which would make the artifact depend on where it was built
    return Capture(model, form, precision, package)


def _mend_attention(model: ir.Model, base: BaseModel, form: str, dtype: str) -> None:
    """State what mobius 0.1.0 leaves out: sliding windows (Gemma 2 and 3, Qwen 2), Gemma 3's attention scale and second rotary table.

    GroupQueryAttention takes a window of W as transformers does: a token sees itself and the W - 1 before it.

    Raises:
        CheckpointError: a layer has a window, and the graph's operator for it cannot express one.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * base.layers
    scalar = getattr(config, "query_pre_attn_scalar", None)
    tables = _rotary_tables(model, base, dtype) if len(set(kinds)) > 1 else {}
    for node in model.graph:
        cache = next((v.name for v in node.inputs if v is not None and v.name and v.name.startswith("past_key_values.")), None)
        if cache is None or node.op_type not in ("GroupQueryAttention", "Attention"):
            continue
        layer = int(cache.split(".")[1])
        if scalar:
            node.attributes["scale"] = ir.AttrFloat32("scale", scalar**-0.5)
        if tables and node.op_type == "GroupQueryAttention":
            for index, table in enumerate(tables[kinds[layer]], start=len(node.inputs) - 2):
                node.replace_input_with(index, table)
        if window and kinds[layer] == "sliding_attention":
            if node.op_type == "GroupQueryAttention":
                node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
            elif form == "tensorrt":
                node.metadata_props[WINDOW] = str(window)  # for LowerAttention, whose mask can express it
            elif window < base.context:
                raise CheckpointError(
                    f"base model {base.name}: layer {layer} attends to a window of {window} tokens, which {node.op_type} cannot express. "
                    "Windows need GroupQueryAttention: --target cpu --precision fp32, or --target cuda with fp16 or bf16."
                )


def _rotary_tables(model: ir.Model, base: BaseModel, dtype: str) -> dict[str, tuple[ir.Value, ir.Value]]:
    """Cosine and sine tables by kind of layer, where the kinds have their own: mobius fuses the first it meets into every layer.

    The standard capture of the same model, which does not fuse them, has both.
    """
    import mobius

    with _quiet():
        plain = mobius.build(str(base.path), execution_provider="onnx-standard", dtype=dtype, load_weights=False)["model"]
    if "model.rotary_emb_local.cos_cache" not in plain.graph.initializers:
        return {}
    tables = {}
    for kind, module in (("full_attention", "rotary_emb"), ("sliding_attention", "rotary_emb_local")):
        pair = []
        for name in (f"model.{module}.cos_cache", f"model.{module}.sin_cache"):
            if name not in model.graph.initializers:
                source = plain.graph.initializers[name]
                model.graph.initializers.add(ir.Value(name=name, shape=source.shape, type=source.type, const_value=source.const_value))
            pair.append(model.graph.initializers[name])
        tables[kind] = (pair[0], pair[1])
    return tables


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence mobius: its progress bars, its prints, its log lines and its warnings."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
