"""Rotary tables: correctly rounded, whatever the processor, and what transformers means by each rope type; artifacts of them are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from flora_export import rotary
from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.errors import CheckpointError
from flora_export.exact import in_double
from flora_export.pipeline import BuildOptions, build
from flora_export.rotary import rotary_tables, round_once
from tests.conftest import silent
from tests.families import FAMILIES, SHAPE, make_adapter, make_base

FULL = "full_attention"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
DIVISORS = {"short_factor": [1.0 + j / 8 for j in range(8)], "long_factor": [1.0 + j / 2 for j in range(8)]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, its ends not whole": {"rope_type": "yarn", **YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, two scales": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, a factor of its own": {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
}


def llama(rope: dict[str, Any], **changes: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**(SHAPE | changes), rope_parameters={"rope_theta": 10000.0, **rope})


def phi3(original: int, **more: Any) -> tf.Phi3Config:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **DIVISORS, **more}
    return tf.Phi3Config(**SHAPE, original_max_position_embeddings=original, rope_parameters=rope)


def test_every_entry_is_within_half_an_ulp() -> None:
    config = llama({"rope_theta": 500000.0, "rope_type": "default"}, max_position_embeddings=131072, head_dim=64)
    cos, sin = rotary_tables(config, FULL, (131072, 32), np.dtype(np.float32))
    rng = np.random.default_rng(0)
    small = np.argsort(np.abs(cos), axis=None)[:50]  # where one ulp is least
    picked = [*small, *rng.integers(0, cos.size, 1500), cos.size - 32, 5]
    for position, pair in (divmod(int(place), 32) for place in picked):
        with mpmath.workdps(60):
            angle = position * mpmath.exp(-mpmath.log(mpmath.mpf(500000)) * pair / 32)
            for got, exact in ((cos[position, pair], mpmath.cos(angle)), (sin[position, pair], mpmath.sin(angle))):
                assert abs(mpmath.mpf(float(got)) - exact) <= mpmath.mpf(float(np.spacing(np.abs(got)))) / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_no_bit_depends_on_the_processor(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine whose last bits are others, as those of another vector unit are."""
    config = llama(ROPES["default"], max_position_embeddings=4096)
    before = rotary_tables(config, FULL, (4096, 8), np.dtype(dtype))
    for name in ("_COS", "_SIN"):
        quick, exact = getattr(rotary, name)
        disturbed: Callable[[Any], Any] = lambda x, quick=quick: np.nextafter(np.nextafter(quick(x), 2), 2)  # noqa: E731
        monkeypatch.setattr(f"flora_export.rotary.{name}", (disturbed, exact))
    after = rotary_tables(config, FULL, (4096, 8), np.dtype(dtype))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(before, after, strict=True))


def test_bfloat16_is_rounded_once() -> None:
    """1 + 2^-8 is a tie, and goes to even; the least more than a tie goes up, which it does not by way of fp32 rounded to nearest."""
    values = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 0.0])
    assert round_once(values, np.dtype(ml_dtypes.bfloat16)).astype(float).tolist() == [1.0, 1 + 2.0**-7, -1 - 2.0**-7, 1.0, 0.0]


def eager_tables(config: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' own module makes, with its fp32 read as fp64: [positions, pairs]."""
    model = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings(), in_double(model), torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    assert cos.dtype == torch.float64
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("name", ROPES)
def test_rope_types_mean_what_transformers_means(name: str) -> None:
    config = llama(ROPES[name])
    for ours, theirs in zip(rotary_tables(config, FULL, (128, 8), np.dtype(np.float32)), eager_tables(config, 128), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2.0**-23)  # half an ulp below 2, and fp64's own error


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}])
def test_longrope_has_a_short_and_a_long_table(more: dict[str, Any]) -> None:
    config = phi3(64, **more)
    ours = rotary_tables(config, FULL, (64 + 128, 8), np.dtype(np.float32))
    for mine, short, long in zip(ours, eager_tables(config, 64), eager_tables(config, 128), strict=True):
        np.testing.assert_allclose(mine, np.concatenate([short, long]), rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("name", [*ROPES, "longrope"])
def test_artifacts_of_every_rope_type_are_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dynamic, yarn's options: mobius 0.1.0 alone reads them otherwise than transformers."""
    monkeypatch.setitem(FAMILIES, "rope", lambda: phi3(64) if name == "longrope" else llama(ROPES[name]))
    base = make_base("rope", tmp_path / "base")
    _, report = build(make_adapter(base, tmp_path / "adapter"), str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified


def test_what_is_unknown_or_does_not_fit_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama(ROPES["default"])
    with pytest.raises(
        CheckpointError, match=r"rotary tables are \[128, 16\] in the captured graph, but the configuration makes \[128, 8\]"
    ):
        rotary_tables(config, FULL, (128, 16), np.dtype(np.float32))
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match="rope type 'spiral' is unknown; it must be one of default, dynamic"):
        rotary_tables(config, FULL, (128, 8), np.dtype(np.float32))
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match=r"rope_parameters of full_attention: KeyError: 'factor', in \{'rope_type': 'linear'"):
        rotary_tables(config, FULL, (128, 8), np.dtype(np.float32))


@pytest.mark.parametrize("form", ["cpu", "cuda", "tensorrt"])
def test_captures_hold_these_tables(bases: Callable[[str], Path], form: str) -> None:
    base = load_base(str(bases("gemma3")))
    config = tf.AutoConfig.from_pretrained(base.path)
    initializers = capture(base, form, "fp16" if form == "cuda" else "fp32").model.graph.initializers
    for kind, module in ((FULL, "model.rotary_emb"), ("sliding_attention", "model.rotary_emb_local")):
        held = [initializers[f"{module}.{part}_cache"].const_value.numpy() for part in ("cos", "sin")]
        expected = rotary_tables(config, kind, held[0].shape, held[0].dtype)
        assert [table.tobytes() for table in held] == [table.tobytes() for table in expected]
