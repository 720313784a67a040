"""Qualcomm QNN: contexts for the HTP of a Snapdragon, compiled ahead of time on any x86-64 Linux, beside the graph that they came from.

`model.onnx` is the portable half: it holds the ledger and is what verification runs, on the CPU. `prefill.onnx` and `decode.onnx` are what
a host loads. This machine cannot run them on an HTP; QNN's simulator can, slowly, and does so at every build (simulate.py).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flora_export.artifact import Artifact
from flora_export.backends import Golden, Plan, Progress, Runner
from flora_export.backends.graph_files import write_graph
from flora_export.backends.onnxruntime import GraphBackend
from flora_export.backends.qnn.apart import PACKAGE, installed_version
from flora_export.backends.qnn.context import CONTEXTS, binaries, compile_contexts, unshared
from flora_export.backends.qnn.lint import lint
from flora_export.backends.qnn.plan import (
    SHOWN,
    ContextOptions,
    ContextPlan,
    choose_chip,
    choose_shapes,
    context_plan,
    read_options,
)
from flora_export.backends.qnn.session import PortableDecoder, QnnDecoder, has_npu
from flora_export.backends.qnn.simulate import STEPS, prove
from flora_export.base_model import BaseModel
from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.manifest import Manifest
from flora_export.passes import Fused

REFUSED = {
    "fp32": "the HTP has no arithmetic in fp32, and would compute in fp16 whatever the graph says",
    "bf16": "the HTP of most chips has no arithmetic in bf16",
}


@dataclass(frozen=True, kw_only=True)
class ContextBuild(Plan):
    contexts: ContextPlan
    simulate: bool


class Qnn(GraphBackend):
    name = "qnn"
    compiled = CONTEXTS
    targets = {"npu": "qnn"}  # noqa: RUF012  # never written to
    unquantized = (
        "weights of 8 bits with activations of 16 were tried, and moved logits of SmolLM2 by 2.5 to 3.4, too far to be called the same "
        "model. Pass --precision fp16"
    )

    def options(self, given: Mapping[str, Any]) -> ContextOptions:
        return read_options(given)

    def prepare(
        self, base: BaseModel, target: str | None, precision: str, align: int | None, options: ContextOptions | None, golden: Golden
    ) -> ContextBuild:
        options = options or ContextOptions()
        plan = super().prepare(base, target, precision, align, options, golden)
        if precision in REFUSED:
            raise FloraExportError(f"--backend qnn takes no --precision {precision}: {REFUSED[precision]}. Pass --precision fp16")
        tokens, places = choose_shapes(options, base.context)
        installed_version()
        shown = min(golden(places)[0], key=len)[: min(SHOWN, tokens, places - STEPS)]
        contexts = ContextPlan(tokens, places, *choose_chip(options), bool(options.share_weights), tuple(shown))
        return ContextBuild(plan.target, plan.form, plan.align, places, contexts=contexts, simulate=options.simulate)

    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        assert isinstance(plan, ContextBuild)
        faults = lint(fused.model)
        if faults:
            raise BackendError(f"the graph has what QNN does not take: {'; '.join(faults[:5])}")
        manifest = write_graph(fused, directory, self.name, plan.target, progress)
        (directory / "genai_config.json").unlink(missing_ok=True)  # it names no model that ONNX Runtime GenAI could run
        artifact = Artifact(directory, manifest)
        if not plan.simulate:
            return self._compile(artifact, directory, plan.contexts, progress)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".base-") as name:
            base = self.decode_base(artifact, fused.base, Path(name)) if manifest.changes else self.decode(artifact, adapter=False)
        return self._compile(artifact, directory, plan.contexts, progress, base)

    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Runner:
        """The contexts, where this machine has the NPU; else, or without its adapter, or while it is built, the portable graph."""
        if artifact.manifest.files:
            context_plan(artifact)  # a host will load the contexts: they are there, and described
        if adapter and artifact.manifest.files and has_npu():
            return QnnDecoder(artifact)
        return PortableDecoder(artifact, adapter=adapter, threads=threads)

    def decode_stored(self, artifact: Artifact, *, exact: bool = False) -> PortableDecoder:
        return PortableDecoder(artifact)

    def decode_graph(self, artifact: Artifact, graph: bytes) -> PortableDecoder:
        return PortableDecoder(artifact, graph=graph)

    def explain(self, artifact: Artifact) -> tuple[dict[str, Any], list[str]]:
        context_plan(artifact)  # it is sound
        engine = artifact.manifest.engine
        return {"engine": engine}, context_lines(engine)

    def lint(self, model: ir.Model) -> list[str]:
        return lint(model)

    def rebuild(self, artifact: Artifact, directory: Path, options: ContextOptions) -> Manifest:
        """Contexts anew, for the artifact's own shapes, and its chip where the options name no other.

        Raises:
            BackendError: QNN refuses.
            VerificationError: the simulator's answers are not the portable graph's.
            ArtifactError: the adapter is merged, and was not simulated when it was built, so that its effect is not known.
        """
        old, known = context_plan(artifact), artifact.manifest.engine["simulated"]
        chip = choose_chip(options, old.soc_model, old.htp_arch)
        share = old.share_weights if options.share_weights is None else options.share_weights
        plan = dataclasses.replace(old, soc_model=chip[0], htp_arch=chip[1], share_weights=share)
        base: Runner | float | None = None
        if options.simulate and not artifact.manifest.changes:
            base = self.decode(artifact, adapter=False)
        elif options.simulate:
            if known is None:
                raise ArtifactError(f"{artifact.path}: its adapter is merged, so its effect cannot be told without the base: --no-simulate")
            base = float(known["effect_at_least"])
        return self._compile(artifact, directory, plan, lambda *_: None, base)

    def _compile(
        self, artifact: Artifact, directory: Path, plan: ContextPlan, progress: Progress, base: Runner | float | None = None
    ) -> Manifest:
        """Contexts of an artifact's graph, into a directory that has it. They are simulated where `base` says what the adapter changes."""
        simulated = None
        if (
            base is not None and plan.share_weights
        ):  # the simulator loads no binary that two graphs share: others of the same graphs it does
            with tempfile.TemporaryDirectory(dir=directory, prefix=".unshared-") as name:
                apart = unshared(plan)
                compile_contexts(directory, Path(name), apart)
                simulated = prove(Path(name), apart, PortableDecoder(artifact), base)
        progress("compiling contexts", 0, 1)
        compiled = compile_contexts(directory, directory, plan)
        if base is not None and not plan.share_weights:
            progress("running the contexts in QNN's simulator", 0, 1)
            simulated = prove(directory, plan, PortableDecoder(artifact), base)
        facts = plan.to_json() | {
            "versions": {PACKAGE: installed_version(), "QNN": compiled.sdk},
            "operators": compiled.operators,
            "bytes": binaries(directory),
            "simulated": None if simulated is None else simulated.to_json(),
        }
        return dataclasses.replace(artifact.manifest, engine=facts, versions=artifact.manifest.versions | {PACKAGE: installed_version()})


def products(counts: Mapping[str, int]) -> int:
    """GEMMs, and the two products of attention."""
    return sum(counts.get(name, 0) for name in ("MatMul", "FullyConnected"))


def context_lines(engine: dict[str, Any]) -> list[str]:
    """What the contexts are and what has proved them, for the eye."""
    versions, found = engine["versions"], engine["simulated"]
    lines = [
        f"contexts: {PACKAGE} {versions[PACKAGE]} (QNN {versions['QNN']}), soc model {engine['soc_model']}"
        + (f", HTP v{engine['htp_arch']}" if engine["htp_arch"] else ""),
        f"  prefill of {engine['prompt_tokens']} tokens, decode of one; a cache of {engine['cache_tokens']} places",
        *(f"  {name}: {sum(n.values())} operators of QNN, {products(n)} of them products" for name, n in engine["operators"].items()),
        *(f"  {name}: {size:,} bytes" for name, size in engine["bytes"].items()),
    ]
    if found is None:
        return [*lines, "  not simulated (--no-simulate)"]
    which = "contexts of the same graphs, each with weights of its own," if engine["share_weights"] else "these contexts"
    lines.append(
        f"  simulated: {which} ran in QNN's simulator of the HTP; {found['agreeing']} of {found['positions']} first tokens agree, largest "
        f"error below {found['error_at_most']:g}, where the adapter changes logits by more than {found['effect_at_least']:g}"
    )
    return lines


BACKEND = Qnn()
