"""Engines of former builds, by all that they depend on. Damaged entries are built again; where nothing can be written, nothing is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_export.base_model import file_sha256
from flora_export.scratch import Scratch

ENTRIES = 8  # kept; the oldest go


def cache_key(model: Path, data: Path, facts: Mapping[str, Any]) -> str:
    """SHA-256 of a graph, its weights, and the facts of how and with what it is compiled."""
    parts = {"model": file_sha256(model), "data": file_sha256(data), **facts}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_directory() -> Path:
    """`$FLORA_EXPORT_CACHE`, or `flora-export/engines` in the user's cache."""
    named = os.environ.get("FLORA_EXPORT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flora-export" / "engines"


def load(key: str) -> tuple[bytes, str] | None:
    """(engine, list of layers) of a former build, or None."""
    file = cache_directory() / key
    try:
        head = json.loads((file / "layers.json").read_text(encoding="utf-8"))
        engine = (file / "model.engine").read_bytes()
        if hashlib.sha256(engine).hexdigest() == head["sha256"]:
            os.utime(file)
            return engine, str(head["layers"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def store(key: str, engine: bytes, layers: str) -> None:
    """Keep an engine, and let go of the oldest."""
    root = cache_directory()
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        with Scratch(".part-", root) as name:
            part, gone = Path(name) / "new", Path(name) / "gone"
            part.mkdir()
            gone.mkdir()
            (part / "model.engine").write_bytes(engine)
            (part / "layers.json").write_text(
                json.dumps({"sha256": hashlib.sha256(engine).hexdigest(), "layers": layers}), encoding="utf-8"
            )
            if (root / key).exists():  # damaged, or made by another build meanwhile
                (root / key).rename(gone / key)
            part.rename(root / key)
            kept = sorted((entry for entry in root.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.stat().st_mtime)
            for entry in kept[:-ENTRIES]:
                entry.rename(gone / entry.name)
