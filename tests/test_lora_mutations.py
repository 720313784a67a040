"""Wrong merges, hashes and ledger forged to agree: the numbers alone catch every one. Faults of the ledger's own, and where a fault is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flora_export.artifact import open_artifact, seal
from flora_export.base_model import load_base
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.proof import check_ledger
from tests.conftest import silent
from tests.families import make_lora
from tests.mutate import edit

PATTERN = {"o_proj": 8}


class Adapter:
    """An adapter's numbers and the base's, by the module of a ledger entry; weights [in, out] as the graph has them."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.base, self.tensors = load_base(str(base)), load_file(adapter / "adapter_model.safetensors")

    def weight(self, module: str) -> Any:
        return self.base.read(f"{module}.weight").T.astype(np.float64)

    def matrix(self, module: str, matrix: str) -> Any:
        return self.tensors[f"base_model.model.{module}.{matrix}"].astype(np.float64)

    def product(self, a_of: str, b_of: str | None = None) -> Any:
        return (self.matrix(b_of or a_of, "lora_B.weight") @ self.matrix(a_of, "lora_A.weight")).T


def other_layer(module: str) -> str:
    return module.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1")


def scale(module: str) -> float:
    return 8 / 8 if "o_proj" in module else 8 / 4


# What stands in the artifact instead of the changed weight of a module, or None: what should.
Wrong = Callable[[Adapter, str], Any]
LORA: dict[str, Wrong] = {
    "the adapter lost": lambda a, m: a.weight(m),
    "one weight lost": lambda a, m: a.weight(m) if m.endswith("0.self_attn.v_proj") else None,
    "2 % too strong": lambda a, m: a.weight(m) + 1.02 * scale(m) * a.product(m),
    "2 % too weak": lambda a, m: a.weight(m) + 0.98 * scale(m) * a.product(m),
    "subtracted": lambda a, m: a.weight(m) - scale(m) * a.product(m),
    "rank_pattern ignored": lambda a, m: a.weight(m) + 2 * a.product(m) if "o_proj" in m else None,
    "alpha / sqrt r instead of alpha / r": lambda a, m: a.weight(m) + 8 / np.sqrt(8 / scale(m)) * a.product(m),
    "the layers swapped": lambda a, m: a.weight(m) + scale(m) * a.product(other_layer(m)),
    "A of the layers swapped": lambda a, m: a.weight(m) + scale(m) * a.product(other_layer(m), m),
    "A and B of one layer swapped for the other's": lambda a, m: (
        a.weight(m) + scale(m) * a.product(other_layer(m)) if m.endswith("mlp.up_proj") else None
    ),
    "merged twice": lambda a, m: a.weight(m) + 2 * scale(m) * a.product(m),
    "rounded to half precision": lambda a, m: (a.weight(m) + scale(m) * a.product(m)).astype(np.float16),
    "one row lost": lambda a, m: (
        np.where(np.arange(32) == 5, a.weight(m), a.weight(m) + scale(m) * a.product(m)) if m.endswith("0.self_attn.v_proj") else None
    ),
}


def dora(adapter: Adapter, module: str, magnitude: Any = None, *, norms: bool = True) -> Any:
    directed = adapter.weight(module) + scale(module) * adapter.product(module)
    m = adapter.matrix(module, "lora_magnitude_vector") if magnitude is None else magnitude
    return directed * m / (np.linalg.norm(directed, axis=0) if norms else np.linalg.norm(adapter.weight(module), axis=0))


DORA: dict[str, Wrong] = {
    "magnitude ignored": lambda a, m: a.weight(m) + scale(m) * a.product(m),
    "norm of the base instead of V": lambda a, m: dora(a, m, norms=False),
    "magnitudes of the layers swapped": lambda a, m: dora(a, m, a.matrix(other_layer(m), "lora_magnitude_vector")),
    "magnitude 2 % off": lambda a, m: dora(a, m, 1.02 * a.matrix(m, "lora_magnitude_vector")),
    "one weight lost": lambda a, m: a.weight(m) if m.endswith("1.mlp.down_proj") else None,
}


Made = dict[str, tuple[Path, Path]]  # method -> (adapter, artifact)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root, found = tmp_path_factory.mktemp("lora"), {}
    for method in ("lora", "dora"):
        adapter = make_lora(base, root / method, use_dora=method == "dora", rank_pattern=PATTERN)
        build(adapter, str(base), root / f"{method}-out", BuildOptions(verify=False), silent)
        found[method] = adapter, root / f"{method}-out"
    return found


def write(out: Path, adapter: Adapter, wrong: Wrong) -> None:
    def change(entry: Any, view: Any) -> None:
        module = entry.tensor.removesuffix(".weight_t")
        if entry.origin == "changed" and (values := wrong(adapter, module)) is not None:
            view[:] = values

    edit(out, change, forge=True)


@pytest.mark.parametrize(("method", "name"), [(m, name) for m, cases in (("lora", LORA), ("dora", DORA)) for name in cases])
def test_a_wrong_merge_is_caught(method: str, name: str, made: Made, base: Path, tmp_path: Path) -> None:
    adapter, right = made[method]
    wrong = (DORA if method == "dora" else LORA)[name]
    out = Path(shutil.copytree(right, tmp_path / "out"))
    write(out, Adapter(base, adapter), wrong)
    report = verify(out, adapter, str(base), VerifyOptions(), silent)
    assert report.numerics is not None
    assert report.numerics.causes, report.to_text()
    if name == "the adapter lost":
        assert report.numerics.causes[0].startswith("missing adapter")
    assert report.first_divergence is not None and report.first_divergence.startswith("written file, layer")
    if name == "one weight lost":
        layer = int(method == "dora")
        assert report.first_divergence.startswith(f"written file, layer {layer}: model.layers.{layer}.")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_same_numbers_written_again_pass(method: str, made: Made, base: Path, tmp_path: Path) -> None:
    """The formulas of this file are right where nothing is wrong."""
    adapter, right = made[method]
    out = Path(shutil.copytree(right, tmp_path / "out"))
    write(out, Adapter(base, adapter), dora if method == "dora" else lambda a, m: a.weight(m) + scale(m) * a.product(m))
    report = verify(out, adapter, str(base), VerifyOptions(), silent)
    assert report.numerics is not None and not report.numerics.causes


def test_the_ledger_accounts_for_every_tensor(made: Made, base: Path, tmp_path: Path) -> None:
    """Without a single wrong byte: a change that is not there, one that is there twice, a weight that is said to be the base's own."""
    (adapter, right), known = made["lora"], load_base(str(base))
    checkpoint = load_checkpoint(adapter, known)
    manifest = open_artifact(right).manifest
    first = manifest.changes[0]
    out = Path(shutil.copytree(right, tmp_path / "out"))

    def faults(**changes: Any) -> str:
        artifact = seal(out, dataclasses.replace(manifest, **changes))
        return "\n".join(check_ledger(artifact, checkpoint, known).faults)

    assert faults() == ""
    assert "has 0 slices in the artifact, but must have one" in faults(changes=manifest.changes[1:])
    assert "has 2 slices in the artifact" in faults(changes=[first, *manifest.changes])
    assert "changes the base model in another way" in faults(changes=[dataclasses.replace(first, scale=3.0), *manifest.changes[1:]])
    as_base = [dataclasses.replace(e, origin="base") if e.tensor == f"{first.tensor}_t" else e for e in manifest.ledger]
    told = faults(ledger=as_base)
    assert f"{first.tensor}: stands unchanged in" in told and f"{first.tensor}: the adapter changes it, but" in told
