"""Backends: from the fused graph to files that a runtime loads. One file or folder each, imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from flora_export.errors import BackendError

# name -> module with `write(Fused, directory, progress) -> Manifest` and `Decoder(Artifact)`. A new backend is one file and one line here.
BACKENDS: dict[str, str] = {"onnxruntime": "flora_export.backends.onnxruntime"}

# Promised by the command line, and not built yet.
PLANNED = ("tensorrt", "triton", "hf")


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
