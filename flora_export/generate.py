"""Text in, text out: an artifact answers, decoded greedily. For the eye and for examples; serving belongs to the backends.

Tokens come from ONNX Runtime GenAI where it can run the artifact, and else from the backend's own Decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flora_export.artifact import Artifact
from flora_export.backends import Limits, Runner, backend_of
from flora_export.base_model import GENERATION, read_json
from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.genai import GenaiTokens
from flora_export.verify.prompts import load_tokenizer


@dataclass(frozen=True)
class Answer:
    """One prompt's answer. Times are in seconds, of the whole batch: to the first token, and per token after it."""

    text: str
    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    time_per_output_token: float
    runtime: str  # genai or decoder


class Tokens(Protocol):
    """Greedy tokens of a batch, one of each row at a time."""

    limits: Limits

    def start(self, room: int) -> list[int]: ...
    def step(self) -> list[int]: ...


def generate(
    artifact: Artifact,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    adapter: bool = True,
    chat: bool = True,
    runtime: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer prompts as one batch.

    Args:
        chat: put each prompt into the tokenizer's chat template, where it has one.
        runtime: genai, decoder, or auto: genai where it can.
        on_text: is given the first prompt's answer piece by piece.

    Raises:
        ArtifactError: the artifact has no tokenizer, its chat template refuses a prompt, or a prompt leaves no room in the
            model's context.
        BackendError: `runtime` is genai, and ONNX Runtime GenAI cannot run the artifact here.
        FloraExportError: `runtime` is genai, and the adapter is to be silenced.
    """
    tokenizer = load_tokenizer(artifact.path)
    config = read_json(artifact.path / "config.json", "model configuration")
    context = config.get("max_position_embeddings")
    rows = [_encode(tokenizer, prompt, chat=chat) for prompt in prompts]
    room = (context if isinstance(context, int) else 2**31) - max(map(len, rows))
    if room < 1 or not all(rows):
        raise ArtifactError(
            f"prompts of {[len(row) for row in rows]} tokens: each must have at least 1, and leave room in a context of {context}"
        )
    ends = end_tokens(artifact, config)
    source, name = _tokens(artifact, rows, ends, runtime, adapter)
    limits = source.limits
    room = min(max_new_tokens, room, limits.total - max(map(len, rows)))
    if room < 1 or max(map(len, rows)) > limits.prompt or len(rows) > limits.batch:
        raise ArtifactError(
            f"{len(rows)} prompts of {[len(row) for row in rows]} tokens: {artifact.path} was built for up to {limits.batch} prompts of "
            f"{limits.prompt} tokens, and {limits.total} in all"
        )

    started = time.perf_counter()
    tokens = source.start(room)
    first = time.perf_counter()
    answers: list[list[int]] = [[] for _ in rows]
    running, shown, steps = set(range(len(rows))), "", 0
    while True:
        for row in sorted(running):
            if tokens[row] in ends:
                running.discard(row)
            else:
                answers[row].append(tokens[row])
        if on_text is not None:
            text = tokenizer.decode(answers[0], skip_special_tokens=True)
            if text.startswith(shown) and not text.endswith("\ufffd"):  # half a character: wait for the rest
                on_text(text[len(shown) :])
                shown = text
        if not running or steps + 1 >= room:
            break
        tokens = source.step()  # a row that has ended goes on, unread
        steps += 1
    per_token = (time.perf_counter() - first) / max(steps, 1)
    return [
        Answer(tokenizer.decode(answer, skip_special_tokens=True), len(row), len(answer), first - started, per_token, name)
        for row, answer in zip(rows, answers, strict=True)
    ]


class _DecoderTokens:
    """The backend's Decoder, padded on the side that the artifact declares."""

    def __init__(self, artifact: Artifact, rows: list[list[int]], *, adapter: bool) -> None:
        self.decoder: Runner = backend_of(artifact).decode(artifact, adapter=adapter)
        self.rows = rows
        self.limits = self.decoder.limits

    def start(self, room: int) -> list[int]:
        self.tokens = [int(logits[-1].argmax()) for logits in self.decoder.start(self.rows)]
        return self.tokens

    def step(self) -> list[int]:
        self.tokens = [int(token) for token in self.decoder.step(self.tokens).argmax(-1)]
        return self.tokens


def _tokens(artifact: Artifact, rows: list[list[int]], ends: set[int], runtime: str, adapter: bool) -> tuple[Tokens, str]:
    """Where tokens come from, and its name. Only our Decoder can silence the adapter."""
    if runtime == "genai" and not adapter:
        raise FloraExportError("ONNX Runtime GenAI runs an artifact as it is: without its adapter, use --runtime decoder")
    if runtime != "decoder" and adapter:
        try:
            return GenaiTokens(artifact, ends, rows), "genai"
        except BackendError:
            if runtime == "genai":
                raise
    source = _DecoderTokens(artifact, rows, adapter=adapter)
    return source, source.decoder.runtime


def _encode(tokenizer: object, prompt: str, *, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[attr-defined]
        except Exception as error:  # a template is a program: it can raise nearly anything
            raise ArtifactError(
                f"the artifact's chat template refused the prompt ({type(error).__name__}: {error}). Give the prompt as it is with --raw."
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
    return list(tokenizer(prompt)["input_ids"])  # type: ignore[operator]


def end_tokens(artifact: Artifact, config: dict[str, object]) -> set[int]:
    """The tokens that end an answer: the generation configuration's, or else those of `config`, config.json."""
    file = artifact.path / GENERATION
    ends = read_json(file, "generation configuration").get("eos_token_id") if file.is_file() else None
    if ends is None:
        ends = config.get("eos_token_id")
    return set(ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [])
