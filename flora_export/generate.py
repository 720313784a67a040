"""Text in, text out: an artifact answers, decoded greedily. For the eye and for examples; serving belongs to the backends.

Tokens come from ONNX Runtime GenAI where it can run the artifact, and else from the backend's own Decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flora_export.artifact import Artifact
from flora_export.backends import Limits, Runner, backend_of
from flora_export.bank import BASE_NAME
from flora_export.base_model import GENERATION, read_json
from flora_export.bounded import bounded
from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.genai import GenaiTokens
from flora_export.verify.prompts import encode_texts, load_tokenizer


@dataclass(frozen=True)
class Answer:
    """One prompt's answer. Times are in seconds, of the whole batch: to the first token, and per token after it."""

    text: str
    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    time_per_output_token: float
    runtime: str  # genai or decoder
    adapter: str | None = None  # of a bank: the one that answered


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
    adapters: Sequence[str] = (),
    chat: bool = True,
    runtime: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer prompts as one batch.

    Args:
        adapters: of a bank: the name of the adapter that answers all prompts, or of each prompt's own.
        chat: put each prompt into the tokenizer's chat template, where it has one.
        runtime: genai, decoder, or auto: genai where it can.
        on_text: is given the first prompt's answer piece by piece.

    Raises:
        ArtifactError: the artifact has no tokenizer, its chat template refuses a prompt, or a prompt leaves no room in the
            model's context.
        BackendError: `runtime` is genai, and ONNX Runtime GenAI cannot run the artifact here.
        FloraExportError: `runtime` is genai, and the adapter is to be silenced; or `adapters` does not say which of a bank's answer.
    """
    chosen = _chosen(artifact, adapters, len(prompts), adapter=adapter)
    tokenizer = load_tokenizer(artifact.path)
    config = read_json(artifact.path / "config.json", "model configuration")
    context = config.get("max_position_embeddings")
    rows = encode(tokenizer, prompts, chat=chat)
    room = (context if isinstance(context, int) else 2**31) - max(map(len, rows))
    if room < 1 or not all(rows):
        raise ArtifactError(
            f"prompts of {[len(row) for row in rows]} tokens: each must have at least 1, and leave room in a context of {context}"
        )
    ends = end_tokens(artifact, config)
    source, name = _tokens(artifact, rows, ends, runtime, adapter, [slot for _, slot in chosen])
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
    who: list[str | None] = [adapter_name for adapter_name, _ in chosen] or [None] * len(rows)
    return [
        Answer(tokenizer.decode(answer, skip_special_tokens=True), len(row), len(answer), first - started, per_token, name, own)
        for row, answer, own in zip(rows, answers, who, strict=True)
    ]


class _DecoderTokens:
    """The backend's Decoder, padded on the side that the artifact declares."""

    def __init__(self, artifact: Artifact, rows: list[list[int]], slots: Sequence[int], *, adapter: bool) -> None:
        self.decoder: Runner = backend_of(artifact).decode(artifact, adapter=adapter)
        if slots:
            self.decoder.choice.choose(slots)
        self.rows = rows
        self.limits = self.decoder.limits

    def start(self, room: int) -> list[int]:
        self.tokens = [int(logits[-1].argmax()) for logits in self.decoder.start(self.rows)]
        return self.tokens

    def step(self) -> list[int]:
        self.tokens = [int(token) for token in self.decoder.step(self.tokens).argmax(-1)]
        return self.tokens


def _chosen(artifact: Artifact, adapters: Sequence[str], prompts: int, *, adapter: bool) -> list[tuple[str, int]]:
    """Of a bank, name and slot of each prompt's adapter; of what is none, nothing.

    Raises:
        FloraExportError: the names do not say who answers, or there is none to choose.
    """
    bank = artifact.manifest.bank
    if bank is None:
        if adapters:
            raise FloraExportError(f"{artifact.path} holds one adapter and is no bank, so there is none to choose: leave --adapter out")
        return []
    names = list(adapters) if adapter else [BASE_NAME]
    if len(names) not in (1, prompts):
        raise FloraExportError(
            f"{artifact.path} is a bank: say who answers with --adapter NAME, once for all prompts or once for each, in order (it was "
            f"given {len(names)} times for {prompts}). There are {', '.join([*bank.taken, BASE_NAME])}."
        )
    chosen = [(name, bank.slot(name)) for name in names]
    return chosen if len(chosen) == prompts else chosen * prompts


def _tokens(
    artifact: Artifact, rows: list[list[int]], ends: set[int], runtime: str, adapter: bool, slots: Sequence[int]
) -> tuple[Tokens, str]:
    """Where tokens come from, and its name. Only our Decoder can silence an adapter; a bank has its base model as a slot."""
    adapter = adapter or bool(slots)
    if runtime == "genai" and not adapter:
        raise FloraExportError("ONNX Runtime GenAI runs an artifact as it is: without its adapter, use --runtime decoder")
    if runtime != "decoder" and adapter:
        try:
            return GenaiTokens(artifact, ends, rows, slots), "genai"
        except BackendError:
            if runtime == "genai":
                raise
    source = _DecoderTokens(artifact, rows, slots, adapter=adapter)
    return source, source.decoder.runtime


def encode(tokenizer: Any, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Prompts as token ids, with `chat` in the tokenizer's chat template where it has one. A template is a program of whoever wrote it.

    Raises ArtifactError where it refuses a prompt, or takes too long or too much memory.
    """
    if not chat or not getattr(tokenizer, "chat_template", None):
        return encode_texts(tokenizer, prompts)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def render() -> list[str]:
        return [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in conversations]

    try:
        texts = bounded(render, "the artifact's chat template")
    except ArtifactError as error:
        raise ArtifactError(f"{error} Give the prompt as it is with --raw.") from error
    return encode_texts(tokenizer, texts, add_special_tokens=False)


def end_tokens(artifact: Artifact, config: dict[str, object]) -> set[int]:
    """The tokens that end an answer: the generation configuration's, or else those of `config`, config.json."""
    file = artifact.path / GENERATION
    ends = read_json(file, "generation configuration").get("eos_token_id") if file.is_file() else None
    if ends is None:
        ends = config.get("eos_token_id")
    return set(ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [])
