"""Backends: from the fused graph to files that a runtime loads. One file or folder each, imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from flora_export.errors import BackendError, FloraExportError

# name -> module with TARGETS, `write(Fused, directory, target, progress) -> Manifest` and `Decoder(Artifact)`. A new backend is one file
# and one line here.
BACKENDS: dict[str, str] = {
    "onnxruntime": "flora_export.backends.onnxruntime",
    "hf": "flora_export.backends.hf",
}

# Promised by the command line, and not built yet.
PLANNED = ("tensorrt", "triton")


def load_backend(name: str) -> ModuleType:
    """Import a backend. Raises BackendError where it, or a package that it needs, is not there."""
    if name not in BACKENDS:
        raise BackendError(f"backend {name} is not built yet; there is {', '.join(BACKENDS)}")
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
