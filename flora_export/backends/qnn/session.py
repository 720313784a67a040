"""An artifact on the machine that serves: its contexts on the NPU. Where there is none, its portable graph on the CPU."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flora_export.artifact import Artifact
from flora_export.backends import Limits
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.qnn.apart import installed_version
from flora_export.backends.qnn.context import CONTEXTS
from flora_export.backends.qnn.plan import context_plan
from flora_export.base_model import file_sha256
from flora_export.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    from flora_export.backends import Cache

Logits = npt.NDArray[np.float32]


def has_npu() -> bool:
    """Whether this machine has Qualcomm's NPU, and onnxruntime-qnn to use it. Machines of another kind are not asked: QNN would print."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return False
    try:
        from flora_export.backends.qnn import host
    except ImportError:
        return False
    found = host.devices()
    return bool(found) and found[0].device.type == ort.OrtHardwareDeviceType.NPU


class PortableDecoder(Decoder):
    """`model.onnx` of an artifact for QNN, on the CPU."""

    def __init__(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, graph: bytes | None = None) -> None:
        super().__init__(artifact, adapter=adapter, threads=threads, graph=graph, provider="CPUExecutionProvider")
        self.runtime = f"ONNX Runtime {ort.__version__} on the CPU, the portable graph; the contexts were not run"


class QnnDecoder:
    """The contexts of an artifact on the HTP. They take one row: those of a batch follow each other, each with a cache of its own."""

    def __init__(self, artifact: Artifact) -> None:
        """Check the contexts' files, then load them.

        Raises:
            ArtifactError: one of them is damaged.
            BackendError: QNN refuses them.
        """
        plan = context_plan(artifact)
        check_contexts(artifact)
        version = installed_version()
        from flora_export.backends.qnn.host import Contexts

        try:
            self.contexts = Contexts(artifact.path, plan.soc_model, plan.htp_arch, plan.share_weights)
        except Exception as error:  # ONNX Runtime raises several types, none public
            remedy = f"They are for soc model {plan.soc_model}: flora-export rebuild {artifact.path} --soc-model N"
            raise BackendError(f"QNN refuses the contexts of {artifact.path}: {error}. {remedy}") from error
        self.limits = Limits(plan.cache_tokens, plan.cache_tokens)
        self.choice = AdapterChoice(artifact)
        self.places = plan.cache_tokens
        self.rows: list[tuple[int, dict[str, npt.NDArray[Any]]]] = []  # of each row: tokens so far, and its cache
        self.runtime = f"ONNX Runtime {ort.__version__} with QNN ({version}) on the HTP, soc model {plan.soc_model}"

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt its logits [tokens, vocabulary]."""
        self._check(max(map(len, prompts)) - 1)
        found = [self.contexts.start(prompt) for prompt in prompts]
        self.rows = [(len(prompt), cache) for prompt, (_, cache) in zip(prompts, found, strict=True)]
        return [logits for logits, _ in found]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        self._check(max(length for length, _ in self.rows))
        found = [self.contexts.step(token, length, cache) for token, (length, cache) in zip(tokens, self.rows, strict=True)]
        self.rows = [(length + 1, cache) for (length, _), (_, cache) in zip(self.rows, found, strict=True)]
        return np.stack([logits for logits, _ in found])

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self._check(past - 1)
        room = ((0, 0), (0, 0), (0, self.places - past), (0, 0))
        padded = {
            f"past_key_values.{layer}.{kind}": np.pad(array, room).astype(np.float16)
            for layer, pair in enumerate(cache)
            for kind, array in zip(("key", "value"), pair, strict=True)
        }
        self.rows = [(past, {name: array[row : row + 1] for name, array in padded.items()}) for row in range(batch)]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""
        return [(int(shape[1]), int(shape[3])) for name, shape in self.contexts.shapes.items() if name.endswith(".key")]

    def _check(self, position: int) -> None:
        if position >= self.places:
            raise BackendError(f"position {position} is beyond the {self.places} places of the artifact's KV cache")


def check_contexts(artifact: Artifact) -> None:
    """Raise ArtifactError where a context is not the file that was built: QNN loads, and runs, what has lost a bit.

    An artifact that is being built has no hashes yet.
    """
    for name in CONTEXTS:
        known = artifact.manifest.files.get(name)
        if known is not None and _digest(artifact.path / name) != known["sha256"]:
            raise ArtifactError(
                f"{artifact.path / name} is not the file that was built. Make it again: flora-export rebuild {artifact.path}"
            )


def _digest(file: Path) -> str:
    return file_sha256(file) if file.is_file() else ""
