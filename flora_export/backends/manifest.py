"""What every backend's manifest says in the same words: the sources, the passes, the blocks, the versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence

from flora_export.ledger import change_records
from flora_export.manifest import BlockRecord, LedgerEntry, Manifest, Tensor
from flora_export.passes import Fused, operator_counts

PACKAGES = ("flora-export", "mobius-onnx", "onnx", "onnx-ir", "transformers", "peft", "torch", "numpy", "safetensors")


def describe(
    fused: Fused,
    *,
    backend: str,
    target: str,
    padding: str,
    versions: dict[str, str],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    blocks: list[BlockRecord],
    ledger: list[LedgerEntry],
) -> Manifest:
    """The manifest of a fused model, still without the files' hashes. `versions` are of the backend's own tools."""
    base, checkpoint = fused.base, fused.checkpoint
    return Manifest(
        backend=backend,
        target=target,
        precision=fused.precision,
        fuse=fused.fuse,
        passes=list(fused.passes),
        align=fused.align,
        cache_tokens=fused.cache_tokens,
        padding=padding,
        verified=False,
        versions=versions | installed(PACKAGES),
        base={"name": str(checkpoint.config.get("base_model_name_or_path") or base.config.get("model_type")), "files": base.digests},
        checkpoint={
            "digest": checkpoint.digest,
            "files": checkpoint.digests,
            "config": checkpoint.config,
            "tensors": list(checkpoint.tensors),
            **({"weights": [weight for _, weight in checkpoint.parts]} if checkpoint.parts and checkpoint.bank is None else {}),
        },
        inputs=list(inputs),
        outputs=list(outputs),
        operators={"before": fused.operators_before, "after": operator_counts(fused.model)},
        blocks=blocks,
        ledger=ledger,
        changes=change_records(checkpoint),
        quantization=fused.quantization,
        merge=not checkpoint.detours,
        bank=checkpoint.bank,
    )


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Their versions; "unknown" of one that is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
