"""Backends: from the fused graph to files that a runtime loads. One file or folder each, imported when it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from flora_export.errors import BackendError, FloraExportError


@dataclass(frozen=True)
class Limits:
    """What a runner takes, beyond the model's own context: tokens of a prompt, tokens in all, rows of a batch."""

    prompt: int = 2**31
    total: int = 2**31
    batch: int = 2**31


# name -> module with TARGETS, `write(Fused, directory, target, progress) -> Manifest` and `Decoder(Artifact)`. A new backend is one file
# and one line here.
BACKENDS: dict[str, str] = {
    "onnxruntime": "flora_export.backends.onnxruntime",
    "tensorrt": "flora_export.backends.tensorrt",
    "hf": "flora_export.backends.hf",
}

# Not a runtime but a place: `build` makes an ONNX Runtime artifact and publishes it (flora_export/publish.py).
PUBLISHED = ("triton",)


def load_backend(name: str) -> ModuleType:
    """Import a backend. Raises BackendError where it, or a package that it needs, is not there."""
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name}; there are {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(BACKENDS[name])
    except ImportError as error:
        raise BackendError(
            f"backend {name} needs a package that is not installed ({error}): pip install 'flora-export[cpu]' or [gpu]"
        ) from error


def capture_form(backend: str, target: str | None) -> tuple[str, str]:
    """(target, form of the capture for it). Without a target it is the backend's first.

    Raises:
        FloraExportError: the backend does not build for that target.
    """
    forms: dict[str, str] = load_backend(backend).TARGETS
    chosen = target or next(iter(forms))
    if chosen not in forms:
        raise FloraExportError(f"backend {backend} does not build for {chosen}; it builds for {', '.join(forms)}")
    return chosen, forms[chosen]


def default_align(backend: str, precision: str) -> int:
    """To what multiple a backend would have ranks padded: tensor cores want 16 bytes, other targets nothing."""
    sizes: dict[str, int] = getattr(load_backend(backend), "ALIGN", {})
    return sizes.get(precision, 1)
