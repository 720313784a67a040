"""The decoder of Triton's `generate`: rows of all lengths take each step together, and each gets what it would get alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder as Plain
from flora_export.backends.triton.program import decoding
from flora_export.backends.triton.program.decoding import Decoder, Row
from flora_export.backends.triton.program.generation import AnswerText
from flora_export.backends.triton.program.sampling import Sampler
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import FAMILIES, make_adapter, make_base
from tests.test_rotary import phi3

LENGTHS = (1, 7, 40, 3, 12, 25)
STEPS = 6
ORIGINAL = 20  # longrope's context before it was stretched
TOLERANCE = 2e-5  # fp32, logits of scale 1; a row's neighbours change no more than the rounding of its products


@pytest.fixture(scope="module", params=["llama", "gemma3", "mistral", "longrope"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """mistral and gemma3 have sliding windows of 8 tokens."""
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "longrope", lambda: phi3(ORIGINAL))
        base = make_base(request.param, root / "base")
    return build(make_adapter(base, root / "adapter"), str(base), root / "out", BuildOptions(verify=False), silent)[0]


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 60, length).tolist() for length in lengths]


def start(decoder: Decoder, prompt: list[int], room: int = STEPS) -> tuple[Row, np.ndarray]:
    row = Row(prompt, room)
    while (logits := decoder.read(row)) is None:
        pass
    row.token = int(logits.argmax())
    return row, logits


def alone(artifact: Artifact, prompt: list[int], steps: int = STEPS) -> list[np.ndarray]:
    """Logits after a prompt and after each greedy token, from the decoder that verification uses."""
    decoder = Plain(artifact)
    logits = [decoder.start([prompt])[0][-1]]
    while len(logits) < steps:
        logits.append(decoder.step([int(logits[-1].argmax())])[0])
    return logits


def together(decoder: Decoder, asked: list[list[int]], late: int = 2) -> list[list[np.ndarray]]:
    """Logits of each row; the last `late` join after two steps, and rows leave when they are done."""
    rows: dict[Row, list[np.ndarray]] = {}
    waiting = list(asked)
    step = 0
    while waiting or decoder.rows:
        while waiting and (len(waiting) > late or step >= 2):
            row, logits = start(decoder, waiting.pop(0))
            rows[row] = [logits]
            decoder.join(row)
        for row, logits in decoder.step():
            rows[row].append(logits)
            row.token = int(logits.argmax())
            if len(rows[row]) == STEPS:
                decoder.leave(row)
        step += 1
    return list(rows.values())


def test_each_row_is_as_if_alone(artifact: Artifact) -> None:
    """Ragged prompts, rows that come and go, windows, and longrope's two tables."""
    asked = prompts()
    wanted = [alone(artifact, prompt) for prompt in asked]
    for got, expected in zip(together(Decoder(artifact.path), asked), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    silenced = Plain(artifact, adapter=False).start([asked[0]])[0][-1]
    assert np.abs(silenced - wanted[0][0]).max() > 100 * TOLERANCE


def test_prompts_read_in_parts(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL", 5)
    decoder = Decoder(artifact.path)
    row = Row(prompts()[2], 1)
    parts = 1
    while (logits := decoder.read(row)) is None:
        parts += 1
    assert parts == (8 if not decoder._switch else 1)  # longrope reads the frequencies of the whole prompt
    np.testing.assert_allclose(logits, alone(artifact, row.prompt, 1)[0], rtol=0, atol=TOLERANCE)


def test_rows_on_their_own(artifact: Artifact) -> None:
    """What a GPU does, and a graph without GroupQueryAttention."""
    decoder = Decoder(artifact.path)
    decoder._together = False
    for got, prompt in zip(together(decoder, prompts()), prompts(), strict=True):
        np.testing.assert_allclose(got, alone(artifact, prompt), rtol=0, atol=TOLERANCE)


def test_memory_grows_and_is_given_back(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROWTH", 16)
    decoder = Decoder(artifact.path)
    small = [start(decoder, prompt, 4)[0] for prompt in prompts([5, 6, 7])]
    for row in small:
        decoder.join(row)
    assert decoder._room == (4, 16)
    large, _ = start(decoder, prompts([100])[0], 20)
    decoder.join(large)
    assert decoder._room == (4, 128)
    assert [array.shape[0] for array in decoder._memory.values()] == [4] * len(decoder._present)
    decoder.leave(large)
    assert decoder._room == (4, 16)
    assert decoder.rows == small
    for row in small:
        decoder.leave(row)
    assert decoder._room == (0, 0)
    assert not decoder._memory


def test_a_cache_that_finds_no_room_changes_nothing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(artifact.path)
    row, _ = start(decoder, prompts()[1])
    decoder.join(row)
    greedy, _ = start(decoder, prompts()[3], 10**6)

    def full(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(decoding.np, "zeros", full)
        with pytest.raises(MemoryError):
            decoder.join(greedy)
    assert decoder.rows == [row]
    np.testing.assert_allclose(decoder.step()[0][1], alone(artifact, row.prompt, 2)[1], rtol=0, atol=TOLERANCE)


# sampling


def frequencies(sampler: Sampler, logits: np.ndarray, draws: int = 4000) -> np.ndarray:
    return np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits)) / draws


def test_samples_have_their_probabilities() -> None:
    logits = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
    wanted = {
        (1.0, 0, 1.0): [0.05, 0.4, 0.1, 0.25, 0.2],
        (0.5, 0, 1.0): np.array([0.05, 0.4, 0.1, 0.25, 0.2]) ** 2 / 0.275,
        (1.0, 2, 1.0): [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0],
        (1.0, 0, 0.5): [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0],
        (1.0, 0, 0.3): [0, 1, 0, 0, 0],
        (1.0, 4, 0.99): np.array([0, 0.4, 0.1, 0.25, 0.2]) / 0.95,
    }
    for (temperature, top_k, top_p), expected in wanted.items():
        drawn = frequencies(Sampler(temperature, top_k, top_p, seed=1), logits)
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=5 * math.sqrt(0.25 / 4000))  # five standard errors
        assert not drawn[np.array(expected) == 0].any()


def test_seeds_and_greed() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    runs = [[Sampler(1.0, 50, 0.9, seed).choose(logits) for _ in range(1)] + [0] for seed in (3, 3)]
    assert runs[0] == runs[1]
    sampler = Sampler(1.0, 0, 1.0, -1)
    assert len({sampler.choose(logits) for _ in range(50)}) > 10
    assert Sampler(0.0, 0, 1.0, -1).choose(logits) == logits.argmax()
    assert Sampler(1e-3, 0, 1.0, 5).choose(np.array([0.0, 3e4, -3e4], np.float32)) == 1  # no overflow


def test_bytes_that_are_no_character_end_no_answer() -> None:
    """A tokenizer that falls back on bytes can be asked for any, and a sampler asks."""
    vocabulary = {"<0xEC>": 0, "<0x84>": 1, "<0xAC>": 2, "<0xE1>": 3, "a": 4, "b": 5, "?": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    answer = AnswerText(tokenizer)
    assert [answer.push(token) for token in (0, 1, 2)] == ["", "", "섬"]
    assert "".join(answer.push(token) for token in (3, 4, 5)).endswith("ab")
    assert answer.rest() == ""
    assert answer.push(3) == ""
    assert answer.rest() == "\ufffd"
