"""The artifact in ONNX Runtime: cached steps and ragged batches equal the whole sequence, padded as the manifest says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.coverage import run_forced
from tests.conftest import silent

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
FORCED = [[20, 21, 22], [23, 24, 25], [26, 27, 28]]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def artifact(request: pytest.FixtureRequest, base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """fp32 has GroupQueryAttention and right padding, fp16 the standard Attention and left padding."""
    options = BuildOptions(precision=request.param, verify=False)
    return build(adapter, str(base), tmp_path_factory.mktemp("decoder") / "out", options, silent)[0]


def test_cached_steps_equal_the_whole_sequence(artifact: Artifact) -> None:
    decoder = Decoder(artifact)
    for prompt, forced in zip(PROMPTS, FORCED, strict=True):
        (stepped,) = run_forced(decoder, [prompt], [forced])
        (whole,) = decoder.start([prompt + forced])
        np.testing.assert_allclose(stepped, whole, rtol=0, atol=1e-5 if artifact.manifest.precision == "fp32" else 5e-3)


def test_ragged_batches_equal_each_row_alone(artifact: Artifact) -> None:
    decoder = Decoder(artifact)
    batch = run_forced(decoder, PROMPTS, FORCED)
    for row, prompt, forced in zip(batch, PROMPTS, FORCED, strict=True):
        (alone,) = run_forced(decoder, [prompt], [forced])
        assert row.shape == alone.shape
        np.testing.assert_allclose(row, alone, rtol=0, atol=1e-5 if artifact.manifest.precision == "fp32" else 5e-3)


def test_the_wrong_padding_is_wrong(artifact: Artifact) -> None:
    """Why the manifest has to say it: with GroupQueryAttention, left-padded rows are silently wrong."""
    if artifact.manifest.padding != "right":
        pytest.skip("the standard Attention takes either")
    wrong = Decoder(Artifact(artifact.path, dataclasses.replace(artifact.manifest, padding="left")))
    short = run_forced(wrong, PROMPTS, FORCED)[1]
    (alone,) = run_forced(wrong, PROMPTS[1:2], FORCED[1:2])
    assert np.abs(short - alone).max() > 0.01


def test_without_its_adapter_it_is_the_base(artifact: Artifact, base: Path, adapter: Path) -> None:
    from flora_export.base_model import load_base
    from flora_export.reference import Reference

    truth = Reference(load_base(str(base)), adapter)
    tolerance = 1e-5 if artifact.manifest.precision == "fp32" else 5e-3
    (bare,) = Decoder(artifact, adapter=False).start(PROMPTS[:1])
    np.testing.assert_allclose(bare, truth.logits(PROMPTS[:1], adapter=False)[0], rtol=0, atol=tolerance)
    (full,) = Decoder(artifact).start(PROMPTS[:1])
    np.testing.assert_allclose(full, truth.logits(PROMPTS[:1])[0], rtol=0, atol=tolerance)
    assert np.abs(full - bare).max() > 10 * tolerance
