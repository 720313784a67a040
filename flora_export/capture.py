"""Base model -> `onnx_ir.Model`. The only file that knows mobius."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.bank import ADAPTER_IDS
from flora_export.base_model import BaseModel
from flora_export.capture_constants import mend_embedding_scale
from flora_export.errors import BackendError, CheckpointError
from flora_export.rotary import longrope_context, rotary_tables
from flora_export.scratch import Scratch

# The forms in which a base model is captured, and the precisions of each: precision -> mobius dtype. `cpu` and `cuda` hold what ONNX
# Runtime's provider of that name can run (the CPU provider has no bfloat16 MatMul). The others hold operators of the ONNX standard alone:
# `tensorrt`, `openvino` and `qnn` are still to be lowered (passes/lower_attention.py); `weights` says how projections hang together, and is
# never run.
PRECISIONS: dict[str, dict[str, str]] = {
    "cpu": {"fp32": "f32", "fp16": "f16"},
    "cuda": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
    "tensorrt": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
    "openvino": {"fp32": "f32", "fp16": "f16"},
    "qnn": {"fp32": "f32", "fp16": "f16"},
    "weights": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
}
LOWERED = ("tensorrt", "openvino", "qnn")

# Metadata of an attention node, for the pass that expresses it.
WINDOW = "flora_export.sliding_window"  # how many tokens it sees, its own included
LONGROPE = "flora_export.longrope"  # the original context, beyond which its tables' second part holds


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
            with _quiet(), Scratch("flora-export-tokenizer-") as plain:
                for file in base.beside:
                    shutil.copyfile(file, Path(plain) / file.name)  # mobius keeps permissions, and writes into what it has copied
                write_ort_genai_config(self.package, str(directory), ep=provider, context_length=base.context, local_config_dir=plain)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"base model {base.name}: its configuration and tokenizer make no genai_config.json ({type(error).__name__}: {error})"
            ) from error
        _leave_out_adapter_ids(directory / "genai_config.json")
        _leave_out_code(directory / "tokenizer_config.json")


def _leave_out_code(file: Path) -> None:
    """A tokenizer of a class of its own, which is not beside it, would be read as another one here than from the base model."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("auto_map", None) is not None:
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _leave_out_adapter_ids(file: Path) -> None:
    """ONNX Runtime GenAI refuses a configuration with an input that it does not know; a generator is given the ids by their name."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["model"]["decoder"]["inputs"].pop(ADAPTER_IDS, None) is not None:
            file.write_text(json.dumps(config, indent=4), encoding="utf-8")


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
        _mend_attention(model, base, form)
        mend_embedding_scale(model, base)
    model.graph.name = "model"  # mobius puts the path of the base model here, which would make the artifact depend on where it was built
    return Capture(model, form, precision, package)


def _mend_attention(model: ir.Model, base: BaseModel, form: str) -> None:
    """State what mobius 0.1.0 leaves out or makes inexactly: rotary tables, each kind of layer's own; sliding windows (Gemma 2 and 3,
    Qwen 2); Gemma 3's attention scale.

    GroupQueryAttention takes a window of W as transformers does: a token sees itself and the W - 1 before it.

    Raises:
        CheckpointError: a layer has a window, and the graph's operator for it cannot express one; or its rotary tables cannot be made.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * base.layers
    scalar = getattr(config, "query_pre_attn_scalar", None)
    tables = _exact_rotary(model, base, config)
    longrope = longrope_context(config)
    for node in model.graph:
        cache = next((v.name for v in node.inputs if v is not None and v.name and v.name.startswith("past_key_values.")), None)
        if cache is None or node.op_type not in ("GroupQueryAttention", "Attention"):
            continue
        layer = int(cache.split(".")[1])
        if scalar:
            node.attributes["scale"] = ir.AttrFloat32("scale", scalar**-0.5)
        if node.op_type == "GroupQueryAttention":
            for index, table in enumerate(tables.get(kinds[layer], ()), start=len(node.inputs) - 2):
                node.replace_input_with(index, table)
            if longrope:
                node.metadata_props[LONGROPE] = str(longrope)
        if window and kinds[layer] == "sliding_attention":
            if node.op_type == "GroupQueryAttention":
                node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
            elif form in LOWERED:
                node.metadata_props[WINDOW] = str(window)  # for LowerAttention, whose mask can express it
            elif window < base.context:
                raise CheckpointError(
                    f"base model {base.name}: layer {layer} attends to a window of {window} tokens, which {node.op_type} cannot express. "
                    "Windows need GroupQueryAttention: fp32, int8 or int4 for --target cpu, any but fp32 for --target cuda."
                )


# mobius's names of the modules that hold a pair of rotary tables, by the kind of layer that they serve.
ROTARY_MODULES = {"full_attention": "model.rotary_emb", "sliding_attention": "model.rotary_emb_local"}


def _exact_rotary(model: ir.Model, base: BaseModel, config: Any) -> dict[str, tuple[ir.Value, ...]]:
    """Replace the rotary tables, whose last bits depend on the processor here, and follow transformers where mobius reads less.

    Returns the cosine and sine of each kind of layer, where the kinds differ: a graph of GroupQueryAttention has the first alone, in
    every layer.
    """
    initializers = model.graph.initializers
    held = [initializers[f"{module}.cos_cache"] for module in ROTARY_MODULES.values() if f"{module}.cos_cache" in initializers]
    if not held or held[0].shape is None or held[0].dtype is None:
        return {}  # positions are learned, or not told
    own = [kind for kind in ROTARY_MODULES if isinstance((getattr(config, "rope_parameters", None) or {}).get(kind), dict)]
    shape, dtype, tables = held[0].shape.numpy(), held[0].dtype.numpy(), {}
    for kind in own or ["full_attention"]:
        try:
            pair = rotary_tables(config, kind, shape, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"base model {base.name}: {error}") from error
        values = []
        for part, table in zip(("cos_cache", "sin_cache"), pair, strict=True):
            name = f"{ROTARY_MODULES[kind]}.{part}"
            if name not in initializers:
                initializers.add(ir.Value(name=name, shape=held[0].shape, type=held[0].type))
            initializers[name].const_value = ir.tensor(table, name=name)
            values.append(initializers[name])
        tables[kind] = tuple(values)
    return tables if own else {}


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
