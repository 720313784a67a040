"""The truth: fp64 in every operation, the model as it was afterwards, and the last word on greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flora_export.base_model import load_base
from flora_export.exact import in_double
from flora_export.reference import Reference
from flora_export.verify.coverage import STEPS, expect
from flora_export.verify.golden import BITS, _rounded
from flora_export.verify.numerics import TOLERANCES, Expected, Logits, Numerics, judge, measure
from tests.conftest import silent

PROMPTS = [[5, 9, 77, 3], [11], [40, 41, 42, 43, 44, 45, 46]]


class Stub(nn.Module):
    """What transformers does in fp32 whatever its weights are: a norm and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(16)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("stop")
        return nn.functional.softmax(self.norm(x.float()), dim=-1, dtype=torch.float32)


def test_fp32_inside_a_model_is_fp64() -> None:
    stub, x = Stub(), torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with in_double(stub):
        got = stub(x)
    normed = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    expected = np.exp(normed) / np.exp(normed).sum(-1, keepdims=True)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-14)
    assert np.abs(stub(x).detach().numpy() - expected).max() > 1e-10  # fp32 is not that near


def test_the_model_is_as_it_was(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        before, kept = model(ids).logits, [(t, t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())]
        rotary = model.model.rotary_emb
        with in_double(model):
            inside = model(ids).logits
            assert model.model.rotary_emb.inv_freq.dtype == torch.float64
        assert inside.dtype == torch.float64
        assert 0 < (inside - before).abs().max() < 1e-5
        assert torch.equal(model(ids).logits, before)
    assert model.model.rotary_emb is rotary
    assert [(t, t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())] == kept


def test_a_failure_inside_leaves_no_trace() -> None:
    stub = Stub()
    stub.fails = True
    with in_double(stub), pytest.raises(RuntimeError, match="stop"):
        stub(torch.zeros(1, 16))
    stub.fails = False
    assert {parameter.dtype for parameter in stub.parameters()} == {torch.float32}
    assert stub(torch.zeros(1, 16)).dtype == torch.float32


def test_a_table_is_looked_up_and_not_cast() -> None:
    table, ids = nn.Embedding(5, 3, dtype=torch.float16), torch.tensor([4, 1])
    with in_double(table):
        rows = table(ids)
        assert table.weight.dtype == torch.float16
    assert torch.equal(rows, table.weight[ids].double())


def test_a_given_cache_is_read_and_left(base: Path, adapter: Path) -> None:
    """In fp64, as transformers would have it from a cache in fp64; and it is there for the next pass."""
    reference = Reference(load_base(str(base)), adapter)
    config, rng = reference.model.config, np.random.default_rng(0)
    shape = (1, config.num_key_value_heads, 6, config.head_dim)
    cache = [
        (rng.standard_normal(shape).astype(np.float16), rng.standard_normal(shape).astype(np.float16))
        for _ in range(config.num_hidden_layers)
    ]
    past = transformers.DynamicCache()
    for layer, pair in enumerate(cache):
        past.update(*(torch.from_numpy(array).double() for array in pair), layer)
    with torch.no_grad(), in_double(reference.model):
        expected = reference.model(input_ids=torch.tensor([[5, 9]]), past_key_values=past, use_cache=True).logits
    for _ in range(2):
        np.testing.assert_array_equal(reference.exact_logits([[5, 9]], cache=cache)[0], expected[0].float().numpy())
    assert np.abs(reference.exact_logits([[5, 9]])[0] - expected[0].numpy()).max() > 1e-3


def test_rows_run_together_are_rows_run_alone(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(load_base(str(base)), adapter)
    together = reference.exact_logits(PROMPTS)
    monkeypatch.setattr("flora_export.reference.BATCH_BYTES", 1)
    for one, other, prompt in zip(together, reference.exact_logits(PROMPTS), PROMPTS, strict=True):
        assert one.shape == (len(prompt), 128)
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-22)  # an ulp of fp32, to which both are rounded
    assert np.abs(together[0] - reference.exact_logits(PROMPTS[:1], adapter=False)[0]).max() > 0.05


class Liar:
    """Eager PyTorch that proposes wrong tokens until its prompt is long enough; the truth counts upwards."""

    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        right = [[(prompt[-1] + step + 1) % 50 for step in range(steps)] for prompt in prompts]
        return [row if len(prompt) > 9 else [*row[:2], 0, *row[3:]] for prompt, row in zip(prompts, right, strict=True)]

    def exact_logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: object = None) -> list[Logits]:
        return [np.eye(50, dtype=np.float32)[[(token + 1) % 50 for token in row]] for row in rows]

    def logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: object = None) -> list[Logits]:
        raise AssertionError("not asked")


def test_the_truth_has_the_last_word_on_greedy_tokens() -> None:
    for item in expect(Liar(), [[1, 2, 3], [7]], lambda *_: silent("", 0, 0)):  # type: ignore[arg-type]
        assert item.tokens == [(item.prompt[-1] + step + 1) % 50 for step in range(STEPS)]
        assert len(item.adapted) == len(item.prompt) + STEPS


def test_eager_far_from_the_truth_is_no_truth() -> None:
    rng = np.random.default_rng(0)
    adapted, base = (rng.standard_normal((6, 50)).astype(np.float32) for _ in range(2))
    for off, causes in ((0.0, []), (0.2, ["no truth"]), (np.nan, ["no truth"])):
        expected = Expected("case", [1, 2], [3, 4, 5, 6], adapted, base, 1e-6, 1e-6, eager=adapted + np.float32(off))
        result = Numerics("fp32", TOLERANCES["fp32"], "arrays", 4, [measure(expected, adapted, base, "case", 1)])
        assert [cause.split(":")[0] for cause in judge(result, allow_vacuous=False)] == causes


def test_golden_logits_are_rounded_well_below_what_a_replay_allows() -> None:
    logits = (30 * np.random.default_rng(0).standard_normal((16, 1000))).astype(np.float32)
    largest = float(np.abs(logits).max())
    rounded = _rounded(logits)
    assert 0 < np.abs(rounded - logits).max() <= largest * 2.0**-BITS < TOLERANCES["fp32"].logits * largest / 20
    disturbed = (logits.astype(np.float64) * (1 + 1e-12)).astype(np.float32)
    assert rounded.tobytes() == _rounded(disturbed).tobytes()
