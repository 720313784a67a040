"""Backends: from the fused graph to files that a runtime loads, and back to numbers. One file or folder each, imported when asked for."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.quantization import BITS

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir

    from flora_export.artifact import Artifact
    from flora_export.backends.choice import AdapterChoice
    from flora_export.base_model import BaseModel
    from flora_export.branch import Branch
    from flora_export.manifest import Manifest
    from flora_export.passes import Fused
    from flora_export.quantization import Quantization

    Logits = npt.NDArray[np.float32]
    Half = npt.NDArray[np.float16]
    Cache = Sequence[tuple[Half, Half]]  # keys and values per layer, each [batch, KV heads, past, head size]

Progress = Callable[[str, int, int], None]  # (what, done, of)
Golden = Callable[[int], tuple[list[list[int]], int]]  # places of a static cache, or 0 -> (prompts, steps after each)

# name -> module with a BACKEND. A new backend is one file and one line here.
BACKENDS: dict[str, str] = {
    "onnxruntime": "flora_export.backends.onnxruntime",
    "tensorrt": "flora_export.backends.tensorrt",
    "hf": "flora_export.backends.hf",
    "openvino": "flora_export.backends.openvino",
    "qnn": "flora_export.backends.qnn",
}
EXTRAS = {"qnn": "'flora-export[qnn]'"}  # that bring a backend which [cpu] and [gpu] do not

# Not a runtime but a place: `build` makes an ONNX Runtime artifact and publishes it (flora_export/publish.py).
PUBLISHED = {"triton": "onnxruntime"}


@dataclass(frozen=True)
class Limits:
    """What a runner takes, beyond the model's own context: tokens of a prompt, tokens in all, rows of a batch."""

    prompt: int = 2**31
    total: int = 2**31
    batch: int = 2**31


@dataclass(frozen=True)
class Plan:
    """How a backend will build for one model: options that have met the model and the machine. A backend that knows more has its own."""

    target: str
    form: str  # of the capture
    align: int  # ranks are padded with zeros to a multiple of it
    cache_tokens: int = 0  # places of a static KV cache; 0: the cache grows
    quantization: Quantization | None = None


class Runner(Protocol):
    """An artifact in its runtime, which `runtime` names, decoding a batch of prompts with a KV cache."""

    runtime: str
    limits: Limits
    choice: AdapterChoice  # of a bank: which adapter answers which row

    def start(self, prompts: list[list[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""

    def step(self, tokens: list[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache, no row padded."""

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""


class Backend(ABC):
    """One runtime: what it builds for, how it writes an artifact, and how it runs one. What is above asks for no more than this."""

    name: str
    targets: Mapping[str, str]  # target -> form of the capture; the first is built for where none is named
    aligned: Mapping[str, int] = {}  # precision -> the multiple that ranks are padded to; 1 where it is silent
    unquantized = ""  # why it builds no int4 and int8 artifacts, and what to do; empty where it does
    compiled: tuple[str, ...] = ()  # files that `rebuild` makes anew
    banks = False  # whether an artifact can hold several adapters, each chosen by itself
    runs_graph = True  # whether a graph that is not finished yet can be run, to find where a build goes wrong

    def form(self, target: str) -> str:
        """The form of the capture for a target. Raises FloraExportError where the backend does not build for it."""
        if target not in self.targets:
            raise FloraExportError(f"backend {self.name} does not build for {target}; it builds for {', '.join(self.targets)}")
        return self.targets[target]

    def options(self, given: Mapping[str, Any]) -> Any:
        """The backend's own options, from what a user gave by name: what `prepare` and `rebuild` take.

        Raises:
            FloraExportError: one of them is unknown to this backend, or its value cannot be.
        """
        for name in given:
            raise FloraExportError(f"--{name.replace('_', '-')} is no option of --backend {self.name}")

    def prepare(self, base: BaseModel, target: str | None, precision: str, align: int | None, options: Any, golden: Golden) -> Plan:
        """Check all that can be checked before anything large is read. What is None is chosen by the backend.

        Args:
            golden: the prompts that the artifact must replay.

        Raises:
            BackendError: a tool or machine that the backend needs is not there.
            FloraExportError: an option that cannot be.
        """
        if precision in BITS and self.unquantized:
            raise FloraExportError(f"--backend {self.name} takes no --precision {precision}: {self.unquantized}")
        chosen = target or next(iter(self.targets))
        return Plan(chosen, self.form(chosen), self.aligned.get(precision, 1) if align is None else align)

    @abstractmethod
    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        """Write an artifact's files into a directory. Returns its manifest, still without the files' hashes.

        Raises:
            FusionError: this backend cannot write such a model; the message says why, and what can.
            BackendError: a tool refuses.
        """

    @abstractmethod
    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Runner:
        """The artifact in its runtime, with its adapter or with its branches silenced. `threads` 0 leaves them to the runtime.

        With `exact`, in the precision that its quantized weights are stated in, without the runtime's own rounding of activations.

        Raises:
            BackendError: the runtime is not there, or refuses the artifact.
        """

    @abstractmethod
    def decode_base(self, artifact: Artifact, base: BaseModel, directory: Path, *, exact: bool = False) -> Runner:
        """The base model as this backend writes it for the artifact's target and precision, in a directory that is there and empty."""

    @abstractmethod
    def block_outputs(self, artifact: Artifact, branches: Sequence[Branch], tokens: list[int]) -> dict[str, tuple[str, Logits]]:
        """What each branch's block returns for one prompt, [tokens, d], and the artifact's name for it, by block; without what is lost."""

    def store(self, model: ir.Model, directory: Path) -> None:
        """Write a bare graph into a directory as this backend's runtime takes it: an arm of a measurement, a base model to compare with."""
        from flora_export.ledger import write_model

        write_model(model, directory)

    def timed(self, artifact: Artifact, threads: int) -> Any:
        """The artifact as the benchmark runs it, without copies to the host. Raises BackendError where this backend cannot be timed yet."""
        raise BackendError(f"{artifact.path} is for {self.name}, but only artifacts of onnxruntime and openvino can be measured yet")

    def explain(self, artifact: Artifact) -> tuple[dict[str, Any], list[str]]:
        """What the backend knows of an artifact beyond its ledger: for programs, and for the eye. Raises ArtifactError."""
        return {}, []

    def lint(self, model: ir.Model) -> list[str]:
        """What the runtime would refuse, drop or get wrong in a graph, a line each."""
        return []

    def rebuild(self, artifact: Artifact, directory: Path, options: Any) -> Manifest:
        """Compile an artifact anew into a directory that has its other files. Raises ArtifactError where there is nothing to compile."""
        raise ArtifactError(f"{artifact.path} is for {self.name}, which has no engine to rebuild")


def check_can_be_silenced(artifact: Artifact) -> None:
    """Raise FloraExportError where the adapter cannot be taken out of the artifact: it is in the base's own weights."""
    if artifact.manifest.changes:
        raise FloraExportError(
            f"{artifact.path}: its adapter is merged into {len(artifact.manifest.changes)} weights of the base model, so it cannot be left "
            "out. Run the base model itself."
        )


def load_backend(name: str) -> Backend:
    """Import a backend. Raises BackendError where it, or a package that it needs, is not there."""
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name}; there are {', '.join(BACKENDS)}")
    try:
        backend: Backend = importlib.import_module(BACKENDS[name]).BACKEND
    except ImportError as error:
        raise BackendError(
            f"backend {name} needs a package that is not installed ({error}): pip install "
            + EXTRAS.get(name, "'flora-export[cpu]' or [gpu]")
        ) from error
    return backend


def backend_of(artifact: Artifact) -> Backend:
    """The backend that an artifact was built by.

    Raises:
        ArtifactError: the manifest names a backend, or a target of it, that there is not.
        BackendError: a package that it needs is not there.
    """
    manifest = artifact.manifest
    if manifest.backend not in BACKENDS or manifest.target not in load_backend(manifest.backend).targets:
        raise ArtifactError(
            f"{artifact.path}: its manifest says backend {manifest.backend!r} and target {manifest.target!r}, which there is not. "
            "Was it built by a newer flora-export? Build it again."
        )
    return load_backend(manifest.backend)
