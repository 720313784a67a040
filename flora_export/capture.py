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
from flora_export.errors import BackendError, CheckpointError

# What each target's ONNX Runtime provider can run: precision -> mobius dtype. The CPU provider has no bfloat16 MatMul.
PRECISIONS: dict[str, dict[str, str]] = {
    "cpu": {"fp32": "f32", "fp16": "f16"},
    "cuda": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
}


@dataclass(frozen=True)
class Capture:
    """The base model as a graph whose weights are read when they are needed, with mobius's package for its configuration."""

    model: ir.Model
    target: str
    precision: str
    package: Any

    def write_runtime_files(self, base: BaseModel, directory: Path) -> None:
        """Write `genai_config.json` and the tokenizer's files into a directory."""
        from mobius.integrations.ort_genai.auto_export import write_ort_genai_config

        with _quiet():
            write_ort_genai_config(
                self.package,
                str(directory),
                ep=self.target,
                context_length=int(base.config.get("max_position_embeddings", 4096)),
                local_config_dir=str(base.path),
            )


def capture(base: BaseModel, target: str, precision: str) -> Capture:
    """Capture a base model for an execution target.

    Raises:
        BackendError: mobius is missing, or the target cannot run that precision.
        CheckpointError: mobius cannot capture this model; its own words are quoted.
    """
    if precision not in PRECISIONS[target]:
        raise BackendError(
            f"precision {precision} does not run on target {target} in ONNX Runtime; it has {', '.join(PRECISIONS[target])}. "
            "For bf16 and fp16 on a GPU, use --target cuda."
        )
    try:
        with _quiet():
            import mobius

            package = mobius.build(str(base.path), execution_provider=target, dtype=PRECISIONS[target][precision])
    except ImportError as error:
        raise BackendError(f"mobius, which captures the base model, cannot be imported ({error}): pip install 'flora-export[cpu]'") from error
    except Exception as error:  # mobius documents no error types
        raise CheckpointError(
            f"base model {base.name}: mobius cannot capture a {base.config.get('model_type')!r} model ({type(error).__name__}: {error})"
        ) from error
    if set(package) != {"model"}:
        raise CheckpointError(f"base model {base.name}: not one decoder, but {', '.join(package)}; only text decoders are supported")
    model: ir.Model = package["model"]
    model.graph.name = "model"  # mobius puts the path of the base model here, which would make the artifact depend on where it was built
    return Capture(model, target, precision, package)


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
