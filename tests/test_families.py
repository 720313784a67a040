"""The matrix: every family, every activation, every fuse level, against eager PyTorch.

`pipeline.build` verifies what it builds: logits within 1e-4 (fp32: another summation order), the adapter's effect within 1 %, prefill and
16 cached steps, single prompts and a ragged batch. Random adapters of full strength, so a lost or misplaced one cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flora_export.branch import ACTIVATIONS, FUSE_LEVELS
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import FAMILIES, GATED_FAMILIES, make_adapter

# Each activation of each kind at least once, two in each family and all in two; gated only where the host MLP is.
PAIRS = [("identity", "gated"), ("identity", "identity"), ("relu", "relu"), ("silu", "silu"), ("gelu", "gelu")]
CASES = [
    (family, pair)
    for place, family in enumerate(FAMILIES)
    for pair in (PAIRS if family in ("llama", "starcoder2_relu") else (PAIRS[0], PAIRS[1 + place % 4]))
    if pair[1] != "gated" or family in GATED_FAMILIES
]


def test_the_matrix_names_every_activation() -> None:
    assert {a for a, _ in PAIRS} == set(ACTIVATIONS["attention"])
    assert {m for _, m in PAIRS} == set(ACTIVATIONS["mlp"])


@pytest.mark.parametrize(("family", "pair"), CASES, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value)
def test_every_fuse_level_equals_eager(family: str, pair: tuple[str, str], bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases(family)
    attention, mlp = pair
    # ranks differ from block to block, so that a mixed-up slice cannot fit
    adapter = make_adapter(
        base, tmp_path / "adapter", attn_activation=attention, mlp_activation=mlp, rank_pattern={r"layers.1.mlp": 6, r"0.self_attn": 3}
    )
    for fuse in FUSE_LEVELS:
        artifact, report = build(adapter, str(base), tmp_path / fuse, BuildOptions(fuse=fuse), silent)
        assert report.numerics is not None
        assert report.ledger.base_tensors_equal >= 2 * 4  # found bit for bit in the base's own file; others may be renamed
        assert min(case.largest_effect for case in report.numerics.cases) > 0.01
        _assert_fused(artifact.manifest.operators, {block.fusion for block in artifact.manifest.blocks}, family, mlp, fuse)


def _assert_fused(operators: dict[str, dict[str, int]], fusions: set[str], family: str, mlp: str, fuse: str) -> None:
    """The graph is what its level says: fused on both sides it has no more GEMMs than the base model."""
    gemms = {when: counts["MatMul"] for when, counts in operators.items()}
    splits = operators["after"].get("Split", 0) - operators["before"].get("Split", 0)
    concats = operators["after"].get("Concat", 0) - operators["before"].get("Concat", 0)
    blocks, matrices = 4, 2 * 2 + 2 * (3 if mlp == "gated" else 2)
    if fuse == "none":
        assert (gemms["after"] - gemms["before"], splits, concats) == (matrices, 0, 0)
        assert fusions == {"none"}
    elif fuse == "forward":
        assert (gemms["after"] - gemms["before"], splits, concats) == (blocks, blocks, 0)
        assert fusions == {"forward"}
    elif fuse == "backward":
        assert (gemms["after"] - gemms["before"], splits, concats) == (matrices - blocks, 0, blocks)
        assert fusions == {"backward"}
    else:
        assert gemms["after"] == gemms["before"]
        neurons = mlp == "gated" or (family, mlp) == ("starcoder2_relu", "relu")
        assert (splits, concats) == ((2, 2) if neurons else (4, 4))
        assert fusions == ({"neurons", "forward+backward"} if neurons else {"forward+backward"})
