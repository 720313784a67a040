"""The campaign's served load: its short form holds, and what it would find is found."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc", reason="extra triton is not installed")
from benchmarks.campaign import served
from benchmarks.campaign.load import Key, Load, Truth

KEYS: list[Key] = [(who, prompt, most) for who in ("first", "base") for prompt in ("a", "b") for most in (1, 4)]
TEXTS = {content: {key: f"{content} {key}" for key in KEYS} for content in ("third", "other")}
WAYS = {"whole": 3, "streamed": 1, "malformed": 1, "slow": 1}


def test_the_short_form_holds(tmp_path: Path) -> None:
    for outcome in served.run(tmp_path, "short", seed=1):
        assert outcome.losses == []
        assert outcome.tried or outcome.not_tried


Answer = Callable[[int, Key], tuple[int, str] | None]  # of the n-th request: version and text; None: nothing


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """A server that says what a test has it say."""
    servers = []

    def start(answer: Answer) -> str:
        asked = iter(range(10**6))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    given = json.loads(body)
                    key = (given["adapter"], given["text_input"], given["max_tokens"])
                    known = key in KEYS
                except (ValueError, TypeError, KeyError):
                    known = False
                if not known:
                    return self.say(400, b'{"error": "no"}')
                found = answer(next(asked), key)
                if found is None:
                    self.close_connection = True
                    return None
                content = {"text_output": found[1], "finish_reason": "stop", "model_version": str(found[0])}
                text = json.dumps(content).encode()
                return self.say(200, b"data: " + text if self.path.endswith("_stream") else text)

            def say(self, status: int, text: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


def losses(address: str, requests: int = 60) -> list[str]:
    load = Load(address, "", Truth(TEXTS), seed=0, max_tokens=9)
    load.run(requests, clients=4, ways=WAYS)
    load.check({1: "third", 2: "other"})
    assert sum(load.asked.values()) == requests
    return load.losses


def right(number: int, key: Key) -> tuple[int, str]:
    return (1, TEXTS["third"][key]) if number % 2 else (2, TEXTS["other"][key])


def test_right_answers_are_no_losses(serve: Callable[[Answer], str]) -> None:
    assert losses(serve(right)) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda number, key: (1, TEXTS["third"]["first" if key[0] == "base" else "base", *key[1:]]), "answer so"),  # the other adapter's
        (lambda number, key: (1, TEXTS["other"][key]), "answer so"),  # the other version's
        (lambda number, key: (3, TEXTS["third"][key]), "to version 3"),
        (lambda number, key: (1, TEXTS["third"][key][:-1]), "not "),
        (lambda number, key: None, "RemoteDisconnected"),
    ],
    ids=["adapter", "version", "no version", "cut off", "dropped"],
)
def test_one_wrong_answer_is_found(serve: Callable[[Answer], str], wrong: Answer, message: str) -> None:
    found = losses(serve(lambda number, key: wrong(number, key) if number == 20 else right(number, key)))
    assert len(found) == 1
    assert message in found[0]
