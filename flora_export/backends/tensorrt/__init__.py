"""TensorRT: lowers the fused graph, builds an engine from it, and keeps both.

`model.onnx` beside `model.engine` is the portable half: the machine that serves can make its own engine from it (`flora-export
rebuild`), and where there is no GPU it is what verification runs, on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.artifact import DATA, ENGINE, LAYERS, MODEL, Artifact
from flora_export.backends import Golden, Plan, Progress, Runner
from flora_export.backends.graph_files import write_graph
from flora_export.backends.onnxruntime import GraphBackend
from flora_export.backends.quantizing import block_of, choose_for_engines
from flora_export.backends.tensorrt import cache
from flora_export.backends.tensorrt.engine import build_engine
from flora_export.backends.tensorrt.explain import engine_lines
from flora_export.backends.tensorrt.flavour import Flavour, choose_capabilities, load_flavour, machine_capability, machine_gpu
from flora_export.backends.tensorrt.layers import Gemm, LayerReport, compare_layers, report_layers
from flora_export.backends.tensorrt.lint import lint
from flora_export.backends.tensorrt.plan import EngineOptions, Profile, check_prompts, engine_plan, profiles_for, read_options, to_json
from flora_export.backends.tensorrt.portable import PortableDecoder
from flora_export.backends.tensorrt.stacks import opened
from flora_export.bank import ADAPTER_IDS
from flora_export.base_model import BaseModel, read_json
from flora_export.capture import capture
from flora_export.errors import ArtifactError, BackendError, CheckpointError, FloraExportError
from flora_export.ledger import planned_entries, write_model
from flora_export.manifest import LedgerEntry, Manifest
from flora_export.passes import Fused, lowering, run_passes
from flora_export.passes.quantize import Quantize
from flora_export.quantization import BITS


@dataclass(frozen=True)
class Recipe:
    """With what, for what and how an engine is to be built: options that have met the model and the machine."""

    flavour: Flavour
    capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    options: EngineOptions

    def facts(self) -> dict[str, Any]:
        """The manifest's words, and what the cache goes by. `engine_plan` reads them."""
        return {
            "flavour": self.flavour.name,
            "version": self.flavour.version,
            "compute_capabilities": list(self.capabilities),
            "profiles": to_json(self.profiles),
            "workspace_mib": self.options.workspace_mib,
            "version_compatible": self.options.version_compatible,
            "refittable": self.options.refittable,
        }


@dataclass(frozen=True, kw_only=True)
class EngineBuild(Plan):
    recipe: Recipe


class TensorRT(GraphBackend):
    name = "tensorrt"
    compiled = (ENGINE, LAYERS)
    banks = True
    targets = {"cuda": "tensorrt"}  # noqa: RUF012  # never written to
    aligned = {"fp16": 8, "bf16": 8}  # noqa: RUF012  # tensor cores want widths that are a multiple of 16 bytes

    def options(self, given: Mapping[str, Any]) -> EngineOptions:
        return read_options(given)

    def prepare(
        self, base: BaseModel, target: str | None, precision: str, align: int | None, options: EngineOptions | None, golden: Golden
    ) -> EngineBuild:
        options = options or EngineOptions()
        if align is None and precision in BITS:
            align = block_of(options.quantization, base.packed)
        plan = super().prepare(base, target, precision, align, options, golden)
        quantization = choose_for_engines(precision, options.quantization, plan.align, base.packed)
        profiles = profiles_for(options.ranges, base.context, options.cache_tokens)
        check_prompts(profiles, *golden(options.cache_tokens))
        flavour = load_flavour(options.flavour)
        if flavour.name == "rtx" and (options.version_compatible or options.timing_cache):
            wrong = (
                "--version-compatible: engines are for one version" if options.version_compatible else "--timing-cache: nothing is timed"
            )
            raise FloraExportError(f"{flavour.title} has no {wrong}. Leave it out, or use --trt-flavor tensorrt.")
        recipe = Recipe(flavour, choose_capabilities(flavour, options.compute_capabilities), profiles, options)
        return EngineBuild(plan.target, plan.form, plan.align, options.cache_tokens, quantization, recipe=recipe)

    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        assert isinstance(plan, EngineBuild)
        return write(fused, directory, plan, progress)

    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Runner:
        """The engine, where this machine has a GPU; else, or without its adapter, the lowered ONNX on the CPU.

        Raises:
            BackendError: this machine's GPU or TensorRT is another than the engine's. While an artifact is being built, and has no hashes
                yet, that is no error: the engine may be meant for another machine.
        """
        plan, here = engine_plan(artifact), machine_capability()
        elsewhere = not artifact.manifest.files and here not in plan.compute_capabilities
        if adapter and here is not None and not elsewhere:
            from flora_export.backends.tensorrt.session import EngineDecoder

            return EngineDecoder(artifact)
        return PortableDecoder(artifact, adapter=adapter, threads=threads)

    def decode_stored(self, artifact: Artifact, *, exact: bool = False) -> PortableDecoder:
        return PortableDecoder(artifact)

    def decode_graph(self, artifact: Artifact, graph: bytes) -> PortableDecoder:
        return PortableDecoder(artifact, graph=graph)

    def explain(self, artifact: Artifact) -> tuple[dict[str, Any], list[str]]:
        engine_plan(artifact)  # it is sound
        engine, gemms = artifact.manifest.engine, read_gemms(artifact)
        return {"engine": engine, "gemms": gemms}, engine_lines(engine, gemms)

    def lint(self, model: ir.Model) -> list[str]:
        return lint(model)

    def rebuild(self, artifact: Artifact, directory: Path, options: EngineOptions) -> Manifest:
        return rebuild(artifact, directory, options)


def write(fused: Fused, directory: Path, plan: EngineBuild, progress: Progress) -> Manifest:
    """Write the lowered graph and its engine into a directory. Returns the manifest, still without the files' hashes.

    Raises:
        BackendError: TensorRT refuses.
    """
    faults = lint(fused.model)
    if faults:
        raise BackendError(f"the graph has what TensorRT does not take: {'; '.join(faults[:5])}")
    manifest = write_graph(fused, directory, "tensorrt", plan.target, progress)
    (directory / "genai_config.json").unlink(missing_ok=True)  # ONNX Runtime GenAI runs no engine
    recipe = plan.recipe
    progress(f"building the engine with {recipe.flavour.title}", 0, 1)
    adapted = _compile(recipe, directory, manifest, fused.model, manifest.ledger)
    base = None
    if recipe.options.compare_base:
        progress("building the base model's engine, to compare", 0, 1)
        bare = capture(fused.base, fused.capture.form, fused.capture.precision).model
        run_passes(bare, lowering(fused.capture.form, fused.cache_tokens))
        if fused.quantization is not None:
            run_passes(bare, [Quantize(fused.quantization, fused.base.packed)])
        with tempfile.TemporaryDirectory(dir=directory) as name:
            write_model(bare, Path(name))
            inputs = [tensor for tensor in manifest.inputs if tensor.name != ADAPTER_IDS]
            bare_manifest = dataclasses.replace(manifest, inputs=inputs, bank=None)
            base = _compile(recipe, Path(name), bare_manifest, bare, planned_entries(bare), keep_engine=False)[1]
    return _finish(directory, manifest, recipe, adapted, base)


def rebuild(artifact: Artifact, directory: Path, options: EngineOptions) -> Manifest:
    """Make the engine of an artifact anew into a directory that has its other files, with the artifact's own profiles and settings.

    Args:
        options: flavour and compute capabilities; what else it says is ignored.

    Raises:
        BackendError: no TensorRT, no GPU to build for, or TensorRT refuses.
        ArtifactError: the artifact does not say how its engine was built.
    """
    old, manifest = engine_plan(artifact), artifact.manifest
    flavour = load_flavour(options.flavour)
    kept = dataclasses.replace(
        options,
        workspace_mib=old.workspace_mib,
        version_compatible=old.version_compatible and flavour.name != "rtx",
        refittable=old.refittable,
    )
    recipe = Recipe(flavour, choose_capabilities(flavour, options.compute_capabilities), old.profiles, kept)
    adapted = _compile(recipe, directory, manifest, ir.load(directory / MODEL), manifest.ledger)
    made = _finish(directory, manifest, recipe, adapted, None)
    if all(made.engine[key] == manifest.engine[key] for key in ("flavour", "version", "compute_capabilities")):
        made.engine["layers"]["base"] = manifest.engine["layers"]["base"]  # the base model's engine would be the same as well
    return made


def read_gemms(artifact: Artifact) -> list[dict[str, Any]]:
    """The GEMMs of an artifact's engine. Raises ArtifactError where its files do not say."""
    try:
        gemms = read_json(artifact.path / LAYERS, "layers of the engine")["gemms"]
        for item in gemms:
            gemm = Gemm(**item)
            if not all(isinstance(name, str) for name in (gemm.profile, *gemm.weights, *gemm.adapters)):
                raise TypeError(f"{item}")
    except (CheckpointError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.path / LAYERS} is damaged ({error}): flora-export rebuild {artifact.path}") from error
    return list(gemms)


def _compile(
    recipe: Recipe, directory: Path, manifest: Manifest, model: ir.Model, ledger: Sequence[LedgerEntry], *, keep_engine: bool = True
) -> tuple[bytes, LayerReport]:
    """An engine from `model.onnx` in a directory, from the cache where it was built before."""
    options, key = recipe.options, ""
    if options.cache and options.timing_cache is None:  # a file of timings is there to be used, and added to
        gpu = "" if recipe.flavour.name == "rtx" else machine_gpu()
        key = cache.cache_key(directory / MODEL, directory / DATA, recipe.facts() | {"gpu": gpu})
    known = cache.load(key) if key else None
    if known is None or (keep_engine and not known[0]):  # a base model's, of which the layers alone were kept
        with opened(directory, manifest) as (graph, inputs):
            known = build_engine(recipe.flavour, graph, inputs, recipe.profiles, recipe.capabilities, options)
        if key:
            cache.store(key, known[0] if keep_engine else b"", known[1])
    return known[0], report_layers(known[1], model, ledger)


def _finish(directory: Path, manifest: Manifest, recipe: Recipe, adapted: tuple[bytes, LayerReport], base: LayerReport | None) -> Manifest:
    engine, report = adapted
    names = [profile.name for profile in recipe.profiles]
    (directory / ENGINE).write_bytes(engine)
    gemms = [dataclasses.asdict(gemm) | {"profile": names[int(gemm.profile)]} for gemm in report.gemms]
    (directory / LAYERS).write_text(json.dumps({"gemms": gemms}, indent=1) + "\n", encoding="utf-8")
    facts = recipe.facts() | {"layers": compare_layers(report, base, names)}
    return dataclasses.replace(manifest, engine=facts, versions=manifest.versions | {recipe.flavour.title: recipe.flavour.version})


BACKEND = TensorRT()
