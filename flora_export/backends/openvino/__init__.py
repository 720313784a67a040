"""OpenVINO: the fused graph as an IR whose KV cache is state, as OpenVINO GenAI and optimum-intel take it, on Intel's CPUs, GPUs and NPUs.

The same files run on all of them. What is verified is what a device computes with INFERENCE_PRECISION_HINT f32 (session.py); a device
that is not there is stood for by the CPU, and the report says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.artifact import IR, Artifact
from flora_export.backends import Golden, Plan, Progress, Runner
from flora_export.backends.graph_files import write_graph
from flora_export.backends.onnxruntime import Decoder as OnnxDecoder
from flora_export.backends.onnxruntime import GraphBackend, Logits
from flora_export.backends.quantizing import QUANTIZING, QuantizationOptions, block_of, choose_quantization, read_options
from flora_export.base_model import BaseModel
from flora_export.branch import Branch
from flora_export.errors import BackendError, FusionError
from flora_export.manifest import Manifest, Tensor
from flora_export.openvino_ir import read_constants
from flora_export.passes import Fused
from flora_export.quantization import BITS

# OpenVINO reports to its makers over the network whenever it is imported, unless this package is absent. What is imported already stays.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class OpenVINO(GraphBackend):
    name = "openvino"
    targets = {"cpu": "openvino", "gpu": "openvino", "npu": "openvino"}  # noqa: RUF012  # never written to

    def options(self, given: Mapping[str, Any]) -> QuantizationOptions:
        super().options({name: value for name, value in given.items() if name not in QUANTIZING})
        return read_options(given)

    def prepare(
        self, base: BaseModel, target: str | None, precision: str, align: int | None, options: QuantizationOptions | None, golden: Golden
    ) -> Plan:
        for name in ("session", "tokenizer"):
            _part(name)
        options = options or QuantizationOptions()
        if align is None and precision in BITS:  # an adapter's ranks are whole blocks: OpenVINO has no weight with part of one
            align = block_of(options, base.packed)
        plan = super().prepare(base, target, precision, align, options, golden)
        quantization = choose_quantization(precision, "cpu", options, base.packed)
        if quantization is None:
            return plan
        return dataclasses.replace(plan, quantization=dataclasses.replace(quantization, accuracy_level=0))

    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        _check_blocks(fused)
        manifest = write_graph(fused, directory, self.name, plan.target, progress)
        progress("converting to OpenVINO", 0, 1)
        model = _part("convert").write_ir(directory)
        (directory / "genai_config.json").unlink(missing_ok=True)  # of ONNX Runtime GenAI
        tokenizer = _part("tokenizer").write_tokenizer(directory)
        constants = read_constants(directory)
        return dataclasses.replace(
            manifest,
            inputs=[_describe(value) for value in model.inputs],
            outputs=[_describe(value) for value in model.outputs],
            ledger=[entry for entry in manifest.ledger if entry.origin != "constant" or entry.initializer in constants],
            versions=manifest.versions | {"openvino": _part("session").VERSION},
            engine={"tokenizer": tokenizer},
        )

    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Runner:
        runner: Runner = _part("session").Decoder(artifact, adapter=adapter, threads=threads)
        return runner

    def store(self, model: ir.Model, directory: Path) -> None:
        super().store(model, directory)
        _part("convert").write_ir(directory)

    def timed(self, artifact: Artifact, threads: int) -> Any:
        return _part("session").Timed(self.decode(artifact, threads=threads))

    def block_outputs(self, artifact: Artifact, branches: Sequence[Branch], tokens: list[int]) -> dict[str, tuple[str, Logits]]:
        if not (artifact.path / IR).exists():  # a stage of the build
            return super().block_outputs(artifact, branches, tokens)
        graph, names = _part("edited").exposed(artifact.path / IR, branches)
        decoder = _part("session").Decoder(artifact, model=graph)
        decoder.start([tokens])
        return {block: (name, decoder.result(name)[0]) for block, name in names.items()}

    def decode_graph(self, artifact: Artifact, graph: bytes) -> OnnxDecoder:
        return OnnxDecoder(artifact, graph=graph, provider="CPUExecutionProvider")

    def explain(self, artifact: Artifact) -> tuple[dict[str, Any], list[str]]:
        missing = artifact.manifest.engine.get("tokenizer")
        lines = [f"tokenizer: not converted, {missing}. A host brings its own."] if missing else []
        return {"engine": artifact.manifest.engine}, lines


def _part(name: str) -> Any:
    """A module of this folder that needs OpenVINO, which a look at an artifact does not. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise BackendError(f"OpenVINO is not installed whole ({error}): pip install 'flora-export[openvino]'") from error


def _check_blocks(fused: Fused) -> None:
    """Raise FusionError where a quantized weight's last block is not whole: OpenVINO's own form has no such thing."""
    for node in fused.model.graph:
        if node.op_type == "MatMulNBits":
            inputs, block = (node.attributes[name].as_int() for name in ("K", "block_size"))
            if inputs % block:
                raise FusionError(
                    f"{node.name}: its {inputs} inputs are no whole number of blocks of {block}. Choose a --block-size that divides it, "
                    f"and an --align that is a multiple of it."
                )


def _describe(value: Any) -> Tensor:
    kinds = {"i64": "INT64", "i32": "INT32", "f32": "FLOAT", "f16": "FLOAT16"}  # the manifest's names, which are ONNX's
    named = ("batch", "past + tokens" if value.any_name == "attention_mask" else "tokens", "")
    shape = [name if dim.is_dynamic else dim.get_length() for dim, name in zip(value.partial_shape, named, strict=False)]
    return Tensor(value.any_name, kinds[value.element_type.get_type_name()], shape)


BACKEND = OpenVINO()
