"""Text generation inside the server: what a request may ask, its prompt as tokens, and its answer as text.

It knows nothing of Triton (model.py does), and needs of the server's Python only onnxruntime and transformers, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .decoding import Decoder, Logits, Row
from .sampling import Sampler

BASE = "base"  # the base model's name beside a bank's adapters
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
CHARACTERS_PER_TOKEN = 64  # a text of more than this for each token of the context is refused before it is tokenized


class RequestError(ValueError):
    """The request is wrong. The message goes to the client."""


@dataclass(frozen=True)
class Settings:
    """What a request may set. Greedy, unless it sets a temperature above 0, or one of top_p, top_k and seed without a temperature."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = -1  # -1: another one each time
    stop: tuple[str, ...] = ()
    stream: bool = False
    chat: bool = True  # put text_input into the model's chat template
    adapter: str | None = None  # of a bank: who answers

    @staticmethod
    def read(given: Mapping[str, Any], most_tokens: int = 0) -> Settings:
        """Check what a request sets, by name; it may ask for at most so many tokens (0: any number). Raises RequestError."""
        known = {field.name for field in fields(Settings)}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise RequestError(f"unknown parameter {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        values = dict(given)
        if "temperature" not in values and values.keys() & {"top_p", "top_k", "seed"}:
            values["temperature"] = 1.0
        if most_tokens:
            values.setdefault("max_tokens", min(Settings.max_tokens, most_tokens))
        for name, (low, high) in {"max_tokens": (1, most_tokens or 2**31 - 1), "top_k": (0, 2**31 - 1), "seed": (-1, 2**31 - 1)}.items():
            if name in values:
                _expect(isinstance(values[name], int) and not isinstance(values[name], bool), name, values[name], "a whole number")
                _expect(low <= values[name] <= high, name, values[name], f"between {low} and {high}")
        for name, most in (("temperature", 100.0), ("top_p", 1.0)):
            if name in values:
                _expect(isinstance(values[name], (int, float)) and not isinstance(values[name], bool), name, values[name], "a number")
                _expect(0.0 <= values[name] <= most, name, values[name], f"between 0 and {most:g}")  # false for NaN
                values[name] = float(values[name])
        _expect(values.get("top_p", 1.0) > 0, "top_p", values.get("top_p"), "above 0")
        for name in ("stream", "chat"):
            _expect(isinstance(values.get(name, False), bool), name, values.get(name), "true or false")
        _expect(isinstance(values.get("adapter", ""), str), "adapter", values.get("adapter"), "a name")
        stop = values.get("stop", ())
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else stop
        sound = isinstance(values["stop"], tuple) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in values["stop"])
        _expect(sound and len(values["stop"]) <= MAX_STOPS, "stop", stop, f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        for text in values["stop"]:
            _expect_unicode(text, "stop")
        return Settings(**values)


def _expect(true: bool, name: str, value: object, expected: str) -> None:
    if not true:
        raise RequestError(f"{name} is {value!r}, but must be {expected}")


def _expect_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say half a character, a lone surrogate
        raise RequestError(f"{name} is not Unicode ({error.reason})") from error


def read_messages(text: str, most: int) -> list[dict[str, str]]:
    """A conversation of at most so many characters: JSON, a list of {"role": ..., "content": ...}. Raises RequestError."""
    if len(text) > most:
        raise RequestError(f"messages has {len(text)} characters, but may have {most}")
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"messages is not JSON ({error})") from error
    sound = isinstance(messages, list) and messages
    if not sound or not all(isinstance(m, dict) and {"role", "content"} == m.keys() and all(isinstance(v, str) for v in m.values())
                            for m in messages):  # fmt: skip
        raise RequestError('messages must be a list such as [{"role": "user", "content": "Hello"}], of texts alone')
    return messages  # type: ignore[no-any-return]


class StopText:
    """Lets text through up to the first stop text; holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.hit = tuple(stops), "", False

    def push(self, text: str, *, last: bool = False) -> str:
        """Returns the text that may be shown now. `hit` is true once a stop text has come."""
        if self.hit:
            return ""
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.held, self.hit = "", True
            return text[: min(found)]
        keep = 0
        if not last:
            keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Model:
    """An artifact: its decoder, and prompts to tokens."""

    def __init__(self, directory: Path, threads: int = 0, most_prompt: int = 0) -> None:
        """Load it. `threads` of one operator; 0 leaves it to ONNX Runtime. `most_prompt` tokens of a prompt; 0: what the context takes."""
        import tokenizers
        import transformers

        config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context: int = config["context_length"]
        self.most_prompt = most_prompt or self.context
        self.most_characters = CHARACTERS_PER_TOKEN * self.most_prompt
        ends = config["eos_token_id"]
        self.ends = set(ends if isinstance(ends, list) else [ends])
        bank = json.loads((directory / "manifest.json").read_text(encoding="utf-8")).get("bank")
        self._slots = {} if bank is None else {name: slot for slot, name in enumerate(bank["names"]) if name} | {BASE: -1}
        self.decoder = Decoder(directory, threads)
        transformers.logging.set_verbosity_error()  # it remarks on the class name that ONNX Runtime GenAI wants
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # One for each direction: they are used by two threads.
        self._decoder = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        self.has_template = bool(self._tokenizer.chat_template)

    def encode(self, text: str | None, messages: Sequence[Mapping[str, str]] | None, settings: Settings) -> list[int]:
        """The prompt of a request as token ids. Raises RequestError where it is empty, too long, or leaves no room in the context."""
        if messages is not None and not self.has_template:
            raise RequestError("messages were given, but this model has no chat template: give text_input")
        if messages is None and settings.chat and self.has_template:
            messages = [{"role": "user", "content": text or ""}]
        if messages is None:
            self._limit(len(text or ""))
        else:  # each message is a token at least
            self._limit(sum(len(message["role"]) + len(message["content"]) + CHARACTERS_PER_TOKEN for message in messages))
        if messages is not None:
            try:
                text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template may raise anything about what it refuses, such as an unknown role
                raise RequestError(f"the chat template refuses the messages ({error})") from error
            self._limit(len(text or ""))
        _expect_unicode(text or "", "the prompt")
        tokens = list(self._tokenizer(text, add_special_tokens=messages is None)["input_ids"])
        if not tokens:
            raise RequestError("the prompt is empty")
        if len(tokens) >= self.context:
            raise RequestError(f"the prompt has {len(tokens)} tokens, but the context holds {self.context} with the answer: shorten it")
        if len(tokens) > self.most_prompt:
            raise RequestError(f"the prompt has {len(tokens)} tokens, but may have {self.most_prompt}: shorten it")
        return tokens

    def check_adapter(self, settings: Settings) -> None:
        """Raises RequestError where a request does not say which adapter of a bank answers, or names one that there is not."""
        known = self._slots
        if settings.adapter is not None and not known:
            raise RequestError("adapter was given, but this model holds one adapter alone: leave it out")
        if known and settings.adapter not in known:
            wrong = "adapter is missing" if settings.adapter is None else f"there is no adapter {settings.adapter!r}"
            raise RequestError(f"{wrong}; there are {', '.join(known)}")

    def _limit(self, size: int) -> None:
        if size > self.most_characters:
            raise RequestError(f"a prompt of {size} characters is too long for {self.most_prompt} tokens")

    def row(self, prompt: list[int], settings: Settings) -> Row:
        """Where a request stands in the decoder; the context may leave it fewer tokens than it asks for."""
        slot = None if settings.adapter is None else self._slots[settings.adapter]
        return Row(prompt, min(settings.max_tokens, self.context - len(prompt)), slot)

    def text(self) -> AnswerText:
        """Where the tokens of a new answer become text."""
        return AnswerText(self._decoder)


class AnswerText:
    """Tokens to text, one at a time. Half a character waits for its other half."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream, self._tokens, self._shown = DecodeStream(skip_special_tokens=True), list[int](), 0

    def push(self, token: int) -> str:
        """The text that a token completes."""
        try:
            return self._step(token)
        except Exception:  # bytes that are no character: with them, what was shown reads as something else, which the library refuses
            self._begin()
            return "\ufffd" + self._step(token)

    def _step(self, token: int) -> str:
        self._tokens.append(token)
        text: str = self._stream.step(self._decoder, token) or ""
        self._shown += len(text)
        return text

    def rest(self) -> str:
        """What is left when no more tokens come: a character that was never completed."""
        return str(self._decoder.decode(self._tokens, skip_special_tokens=True))[self._shown :]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last has a reason: "stop" (end token or stop text) or "length"; only it counts tokens."""

    text: str
    reason: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(eq=False)
class Job:
    """One request on its way. `send` gets each piece; `fail` gets a message instead of the last; `cancelled` says that nobody listens."""

    model: Model
    prompt: list[int]
    settings: Settings
    send: Callable[[Piece], None]
    fail: Callable[[str, str], None]  # (message, "cancelled" or "internal")
    cancelled: Callable[[], bool]

    def __post_init__(self) -> None:
        settings = self.settings
        self.row = self.model.row(self.prompt, settings)
        self._sampler = Sampler(settings.temperature, settings.top_k, settings.top_p, settings.seed)
        self._answer, self._stop = self.model.text(), StopText(settings.stop)
        self._room, self._count, self._text = self.row.most - len(self.prompt), 0, ""

    def take(self, logits: Logits) -> bool:
        """Choose the next token, and send what it makes of the answer. Returns whether that was the last."""
        token = self.row.token = self._sampler.choose(logits)
        self._count += 1
        ended = token in self.model.ends
        text = self._stop.push("" if ended else self._answer.push(token))
        if ended or self._count >= self._room:
            text += self._stop.push(self._answer.rest(), last=True)
        reason = "stop" if ended or self._stop.hit else "length" if self._count >= self._room else ""
        if self.settings.stream and text and not reason:
            self.send(Piece(text))
        elif not self.settings.stream:
            self._text += text
        if reason:
            new = self._count - ended
            self.send(Piece(text if self.settings.stream else self._text, reason, len(self.prompt), new))
        return bool(reason)
