"""TensorRT: lowers the fused graph, builds an engine from it, and keeps both.

`model.onnx` beside `model.engine` is the portable half: the machine that serves can make its own engine from it (`flora-export
rebuild`), and where there is no GPU it is what verification runs, on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.artifact import DATA, ENGINE, LAYERS, MODEL, Artifact, Manifest
from flora_export.backends.onnxruntime import write_graph
from flora_export.backends.tensorrt import cache
from flora_export.backends.tensorrt.engine import build_engine
from flora_export.backends.tensorrt.flavour import Flavour, choose_capabilities, load_flavour, machine_capability
from flora_export.backends.tensorrt.layers import LayerReport, compare_layers, report_layers
from flora_export.backends.tensorrt.lint import lint
from flora_export.backends.tensorrt.plan import EngineOptions, Profile, check_prompts, engine_plan, profiles_for, to_json
from flora_export.backends.tensorrt.portable import PortableDecoder
from flora_export.capture import capture
from flora_export.errors import BackendError
from flora_export.ledger import Progress, write_model
from flora_export.passes import Fused, lowering, run_passes

TARGETS = {"cuda": "tensorrt"}  # target -> form of the capture
ALIGN = {"fp16": 8, "bf16": 8}  # tensor cores want widths that are a multiple of 16 bytes

Stage = Callable[[str], None]  # says what is being done


def write(
    fused: Fused, directory: Path, target: str, progress: Progress | None = None, options: EngineOptions | None = None, stage: Stage = print
) -> Manifest:
    """Write the lowered graph and its engine into a directory. Returns the manifest, still without the files' hashes.

    Raises:
        BackendError: no TensorRT, no GPU to build for, or TensorRT refuses.
        FloraExportError: a profile or compute capability that cannot be.
    """
    options = options or EngineOptions()
    flavour = load_flavour(options.flavour)
    capabilities = choose_capabilities(flavour, options.compute_capabilities)
    profiles = profiles_for(options.ranges, fused.base.context, fused.cache_tokens)
    faults = lint(fused.model)
    if faults:
        raise BackendError(f"the graph has what TensorRT does not take: {'; '.join(faults[:5])}")
    manifest = write_graph(fused, directory, "tensorrt", target, progress)
    (directory / "genai_config.json").unlink(missing_ok=True)  # ONNX Runtime GenAI runs no engine
    stage(f"building the engine with {flavour.title}")
    adapted = _compile(flavour, directory, manifest, fused.model, profiles, capabilities, options)
    base = None
    if options.compare_base:
        stage("building the base model's engine, to compare")
        bare = capture(fused.base, fused.capture.form, fused.capture.precision).model
        run_passes(bare, lowering(fused.capture.form, fused.cache_tokens))
        with tempfile.TemporaryDirectory(dir=directory) as name:
            write_model(bare, Path(name))
            base = _compile(flavour, Path(name), manifest, bare, profiles, capabilities, options, keep_engine=False)[1]
    return _finish(directory, manifest, flavour, capabilities, profiles, options, adapted, base)


def rebuild(artifact: Artifact, directory: Path, options: EngineOptions) -> Manifest:
    """Make the engine of an artifact anew into a directory that has its other files, with the artifact's own profiles and settings.

    Args:
        options: flavour and compute capabilities; what else it says is ignored.

    Raises:
        BackendError: as `write`.
        ArtifactError: the artifact does not say how its engine was built.
    """
    manifest = artifact.manifest
    plan = engine_plan(artifact)
    options = dataclasses.replace(
        options, workspace_mib=plan.workspace_mib, version_compatible=plan.version_compatible, refittable=plan.refittable
    )
    flavour = load_flavour(options.flavour)
    capabilities = choose_capabilities(flavour, options.compute_capabilities)
    model = ir.load(directory / MODEL)
    adapted = _compile(flavour, directory, manifest, model, plan.profiles, capabilities, options)
    return _finish(directory, manifest, flavour, capabilities, plan.profiles, options, adapted, None)


def check_golden(artifact: Artifact, prompts: list[list[int]], steps: int) -> None:
    """Raise FloraExportError where the engine's profiles leave out what every artifact must replay."""
    check_prompts(engine_plan(artifact).profiles, prompts, steps)


def Decoder(  # each backend has one by this name
    artifact: Artifact, *, adapter: bool = True, threads: int = 0, graph: bytes | None = None
) -> Any:
    """The engine, where this machine has a GPU; else, or without its adapter, or with another graph, the lowered ONNX on the CPU."""
    if adapter and graph is None and machine_capability() is not None:
        from flora_export.backends.tensorrt.session import EngineDecoder

        return EngineDecoder(artifact)
    return PortableDecoder(artifact, adapter=adapter, threads=threads, graph=graph)


def _compile(
    flavour: Flavour,
    directory: Path,
    manifest: Manifest,
    model: ir.Model,
    profiles: tuple[Profile, ...],
    capabilities: tuple[str, ...],
    options: EngineOptions,
    *,
    keep_engine: bool = True,
) -> tuple[bytes, LayerReport]:
    """An engine from `model.onnx` in a directory, from the cache where it was built before."""
    facts = _facts(flavour, capabilities, profiles, options)
    key = cache.cache_key(directory / MODEL, directory / DATA, facts) if options.cache else ""
    known = cache.load(key) if key else None
    if known is None:
        known = build_engine(flavour, directory / MODEL, manifest.inputs, profiles, capabilities, options)
        if key:
            cache.store(key, known[0] if keep_engine else b"", known[1])
    return known[0], report_layers(known[1], model)


def _facts(flavour: Flavour, capabilities: Sequence[str], profiles: Sequence[Profile], options: EngineOptions) -> dict[str, Any]:
    """How and for what an engine is built: the manifest's words, and what the cache goes by. `engine_plan` reads them."""
    return {
        "flavour": flavour.name,
        "version": flavour.version,
        "compute_capabilities": list(capabilities),
        "profiles": to_json(profiles),
        "workspace_mib": options.workspace_mib,
        "version_compatible": options.version_compatible,
        "refittable": options.refittable,
    }


def _finish(
    directory: Path,
    manifest: Manifest,
    flavour: Flavour,
    capabilities: tuple[str, ...],
    profiles: tuple[Profile, ...],
    options: EngineOptions,
    adapted: tuple[bytes, LayerReport],
    base: LayerReport | None,
) -> Manifest:
    engine, report = adapted
    (directory / ENGINE).write_bytes(engine)
    gemms = [dataclasses.asdict(gemm) | {"profile": profiles[gemm.profile].name} for gemm in report.gemms]
    (directory / LAYERS).write_text(json.dumps({"gemms": gemms}, indent=1) + "\n", encoding="utf-8")
    facts = _facts(flavour, capabilities, profiles, options)
    facts["layers"] = compare_layers(report, base, [profile.name for profile in profiles])
    return dataclasses.replace(manifest, engine=facts, versions=manifest.versions | {flavour.title: flavour.version})
