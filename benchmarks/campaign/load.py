"""Clients of a tritonserver that ask in every way they may and may not, and hold each answer to what the artifact itself answers."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import tritonclient.grpc as triton

Key = tuple[str, str, int]  # adapter ("" where there is no bank), prompt, max_tokens
PATH = "/v2/models/generate/generate"
TOLERANCE = 1e-4  # of logits of scale 1, in fp32: the same graph in the same runtime, beside other rows

# How often each way of asking comes.
WAYS = {"whole": 60, "streamed": 12, "sampled": 8, "scored": 8, "malformed": 6, "cancelled": 5, "slow": 1}

# What no server should answer. Tritonserver's own parser refuses what is no JSON with status 500.
MALFORMED: Sequence[bytes] = (
    b"",
    b"{",
    b"nonsense",
    b"[1, 2]",
    b"null",
    b'{"text_input": "a", "text_input": ["b", "c"]}',
    b'{"text_input": {"a": 1}}',
    b'{"text_input": "\xff\xfe"}',
    b'{"text_input": "a", "max_tokens": -1}',
    b'{"text_input": "a", "max_tokens": 1e99}',
    b'{"text_input": "a", "max_tokens": "12"}',
    b'{"text_input": "a", "max_tokens": 100000}',
    b'{"text_input": "a", "temperature": NaN}',
    b'{"text_input": "a", "temperature": -1.0}',
    b'{"text_input": "a", "top_p": 0.0}',
    b'{"text_input": "a", "seed": -7}',
    b'{"text_input": "a", "nonsense": 1}',
    b'{"text_input": "a", "adapter": "nobody"}',
    b'{"text_input": "a", "stop": [""]}',
    b'{"text_input": "a", "messages": "[]"}',
    b'{"messages": "[{]"}',
    b'{"messages": "[{\\"role\\": 1}]"}',
    b'{"max_tokens": 3}',
    b'{"text_input": "", "chat": false}',
    b'{"text_input": "' + b"a" * 300_000 + b'"}',
    b"[" * 50_000,
)


@dataclass
class Truth:
    """What the artifact answers, apart from any server: greedy texts, and for a bank's slots the last logits of some rows."""

    texts: dict[str, dict[Key, str]]  # by content: a version holds one of these
    rows: list[list[int]] = field(default_factory=list)
    logits: dict[tuple[int | None, int], Any] = field(default_factory=dict)  # by slot and row
    fixed: frozenset[str] = frozenset()  # adapters that are the same in all contents
    sampled: dict[Key, str] = field(default_factory=dict)  # by a number as the seed, as the idle server answered
    caches: dict[str, tuple[int, int]] = field(default_factory=dict)  # (KV heads, head size) by the name of the input


class Load:
    """Requests on their way, what came of them, and how long they took."""

    def __init__(self, http_address: str, grpc_address: str, truth: Truth, seed: int, max_tokens: int) -> None:
        self.http, self.grpc, self.truth, self.seed, self.max_tokens = http_address, grpc_address, truth, seed, max_tokens
        self.asked: Counter[str] = Counter()
        self.losses: list[str] = []
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self._answers: list[tuple[int, int, str, Key]] = []  # (request, version, text, what was asked)
        self._local, self._numbers, self._lock = threading.local(), count(), threading.Lock()

    def run(self, requests: int, clients: int, ways: Mapping[str, int] = WAYS) -> None:
        """Ask so often in all, each client again as soon as it has its answer."""
        end = next(self._numbers) + requests
        names, weights = list(ways), list(ways.values())

        def client(_: int) -> None:
            while (number := next(self._numbers)) <= end:
                chance = random.Random(f"{self.seed}-{number}")
                way = chance.choices(names, weights)[0]
                started = time.perf_counter()
                try:
                    lost = getattr(self, f"_{way}")(number, chance)
                except Exception as error:
                    self._local.http = None
                    lost = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.asked[way] += 1
                    self.seconds[way].append(time.perf_counter() - started)
                    if lost:
                        self.losses.append(f"request {number}, {way}: {lost}")
            if connection := getattr(self._local, "http", None):
                connection.close()

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))

    def check(self, contents: Mapping[int, str]) -> None:
        """Hold all answers to what their versions hold, by the name of its content."""
        for number, version, text, key in self._answers:
            wanted = self.truth.texts[contents[version]][key] if version in contents else None
            if text != wanted:
                others = [
                    who for who, texts in self.truth.texts.items() for other, t in texts.items() if t == text and other[1:] == key[1:]
                ]
                whose = f"; {others} answer so" if others else ""
                self.losses.append(f"request {number} to version {version}, {key}: {text!r}, not {wanted!r}{whose}")
        self._answers.clear()

    # one request each: None, or what was lost

    def _whole(self, number: int, chance: random.Random) -> str | None:
        key = self._key(chance)
        status, answer = self._post(PATH, self._body(key))
        return self._note(number, key, status, [answer])

    def _streamed(self, number: int, chance: random.Random) -> str | None:
        key = self._key(chance)
        status, pieces = self._post(f"{PATH}_stream", self._body(key, stream=True))
        return self._note(number, key, status, pieces)

    def _sampled(self, number: int, chance: random.Random) -> str | None:
        key = chance.choice(list(self.truth.sampled))
        status, answer = self._post(PATH, self._body(key, temperature=0.8, seed=7))
        text = answer.get("text_output", answer)
        return None if (status, text) == (200, self.truth.sampled[key]) else f"{key}: {status}, {text!r}, not {self.truth.sampled[key]!r}"

    def _scored(self, number: int, chance: random.Random) -> str | None:
        """A prefill in `decoder`, which joins rows of equal lengths."""
        slot, row = chance.choice(list(self.truth.logits))
        ids = np.array([self.truth.rows[row]], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds |= {name: np.zeros((1, heads, 0, size), np.float32) for name, (heads, size) in self.truth.caches.items()}
        if slot is not None:
            feeds["adapter_ids"] = np.array([[slot]], np.int64)
        if getattr(self._local, "grpc", None) is None:
            self._local.grpc = triton.InferenceServerClient(self.grpc)
        kinds = {np.dtype(np.int64): "INT64", np.dtype(np.float32): "FP32"}
        inputs = [triton.InferInput(name, a.shape, kinds[a.dtype]).set_data_from_numpy(a) for name, a in feeds.items()]
        answer = self._local.grpc.infer("decoder", inputs, outputs=[triton.InferRequestedOutput("logits")])
        off = float(np.abs(answer.as_numpy("logits")[0, -1] - self.truth.logits[slot, row]).max())
        return None if off <= TOLERANCE else f"logits of slot {slot}, row {row} are off by {off}"

    def _malformed(self, number: int, chance: random.Random) -> str | None:
        body = chance.choice(MALFORMED)
        if self._key(chance)[0] and b"adapter" not in body:  # or a bank would refuse it for that
            body = body.replace(b'{"', b'{"adapter": "first", "', 1)
        status, answer = self._post(PATH, body)
        refused = 400 <= status <= 500 and isinstance(answer, dict) and "error" in answer
        return None if refused else f"{body[:60]!r} got {status}, {answer}"

    def _cancelled(self, number: int, chance: random.Random) -> str | None:
        """A client that goes after the first piece."""
        key = self._key(chance)
        connection = http.client.HTTPConnection(self.http, timeout=120)
        try:
            connection.request("POST", f"{PATH}_stream", self._body((*key[:2], self.max_tokens), stream=True))
            line = connection.getresponse().readline()
            return None if b"text_output" in line else f"the first piece is {line!r}"
        finally:
            connection.close()

    def _slow(self, number: int, chance: random.Random) -> str | None:
        """A client that sends and reads a few bytes at a time."""
        key = self._key(chance)
        body = self._body(key)
        connection = http.client.HTTPConnection(self.http, timeout=120)
        try:
            connection.putrequest("POST", PATH)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            for start in range(0, len(body), 20):
                connection.send(body[start : start + 20])
                time.sleep(0.02)
            answer, text = connection.getresponse(), b""
            while part := answer.read(32):
                text += part
                time.sleep(0.01)
            return self._note(number, key, answer.status, [json.loads(text)])
        finally:
            connection.close()

    # the pieces of a request

    def _key(self, chance: random.Random) -> Key:
        return chance.choice(list(next(iter(self.truth.texts.values()))))

    def _body(self, key: Key, **more: Any) -> bytes:
        adapter, prompt, most = key
        named = {"adapter": adapter} if adapter else {}
        return json.dumps({"text_input": prompt, "max_tokens": most, **named, **more}).encode()

    def _post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and answer, of a stream a list of pieces. One try: a request that is dropped is lost."""
        if getattr(self._local, "http", None) is None:
            self._local.http = http.client.HTTPConnection(self.http, timeout=120)
        self._local.http.request("POST", path, body)
        answer = self._local.http.getresponse()
        text = answer.read().decode()
        if path.endswith("_stream") and answer.status == 200:
            return 200, [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
        return answer.status, json.loads(text)

    def _note(self, number: int, key: Key, status: int, pieces: Any) -> str | None:
        if status != 200 or not all("text_output" in piece for piece in pieces):
            return f"{key}: {status}, {pieces}"
        if "finish_reason" not in pieces[-1]:
            return f"{key}: the answer has no end, {pieces[-1]}"
        text = "".join(piece["text_output"] for piece in pieces)
        with self._lock:
            self._answers.append((number, int(pieces[-1]["model_version"]), text, key))
        return None


def throughput(address: str, bodies: Sequence[bytes], clients: int) -> float:
    """New tokens a second, of so many clients, each of which asks again as soon as it has its answer."""

    def ask(body: bytes) -> int:
        connection = http.client.HTTPConnection(address, timeout=120)
        connection.request("POST", PATH, body)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return int(answer["new_tokens"])

    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        tokens = sum(pool.map(ask, bodies))
        return tokens / (time.perf_counter() - started)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 1) for p in (50, 90, 99, 99.9, 100)} if seconds else {}


def in_background(call: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Start it in a thread; what it raises is kept."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # whoever waits for the thread tells it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised
