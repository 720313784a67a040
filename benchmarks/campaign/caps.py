"""What is too much for a server: tokens, requests at once, bodies, brackets, clients that stand still."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign.load import PATH
from benchmarks.campaign.outcome import Outcome

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "04_triton"))
from server import Proxy, Server  # found on the path above

CONNECTIONS = 256  # that nginx.conf allows


@dataclass(frozen=True)
class Limits:
    """What the server allows: `max_tokens` of a request, requests at work, requests that wait."""

    tokens: int
    slots: int
    queue: int


def try_caps(server: Server, work: Path, limits: Limits) -> Outcome:
    """What is too much is refused, with its cause, and the server goes on."""
    outcome = Outcome("served", "too much at once is refused with its cause: tokens, requests, bodies, brackets, idle clients")
    good = json.dumps({"text_input": "what", "max_tokens": 2, "adapter": "first"})

    def ask(address: str, body: str, seconds: float = 60) -> tuple[int, str]:
        connection = http.client.HTTPConnection(address, timeout=seconds)
        try:
            connection.request("POST", PATH, body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def expect(what: str, found: tuple[int, str], status: tuple[int, ...], text: str) -> None:
        outcome.tried += 1
        if found[0] not in status or text not in found[1]:
            outcome.losses.append(f"{what}: {found[0]}, {found[1][:200]!r}, not {status} with {text!r}")

    found = at_once(server.http, good.replace("2,", f"{limits.tokens},").encode(), 2 * (limits.queue + 3 * limits.slots))
    for each in found:
        expect("more than the queue holds", each, (200, 503), "text_output" if each[0] == 200 else "Exceeds maximum queue size")
    outcome.figures["more than the queue holds"] = {str(status): n for status, n in sorted(Counter(status for status, _ in found).items())}
    if {status for status, _ in found} != {200, 503}:
        outcome.losses.append(f"of {len(found)} at once none was refused, or all: {outcome.figures}")
    expect("max_tokens", ask(server.http, good.replace("2,", f"{limits.tokens + 1},")), (400,), f"must be between 1 and {limits.tokens}")
    if shutil.which("nginx") is None:
        outcome.not_tried.append("there is no nginx here, so its recipe was not tried")
        return outcome
    proxy = Proxy(server, work / "nginx")
    try:
        expect("a question", ask(proxy.http, good), (200,), "text_output")
        for megabytes in (2, 64, 256):
            body = json.dumps({"text_input": "a" * megabytes * 2**20})
            try:
                found = ask(proxy.http, body)
            except (BrokenPipeError, ConnectionResetError):  # it closes while the client still sends
                found = 413, "a body may have 1 MiB"
            expect(f"{megabytes} MiB", found, (413,), "a body may have 1 MiB")
        half = 2**19 - 64
        for body in ("[" * 2**20, '{"text_input": ' + "[" * half + "]" * half + "}"):
            expect("brackets", ask(proxy.http, body), (400, 500), "error")
        outcome.figures |= _idle(proxy, lambda: expect("one more than may be", ask(proxy.http, good), (503,), "too many requests at once"))
        expect("when the others have gone", ask(proxy.http, good), (200,), "text_output")
        expect("after all of it", ask(server.http, good), (200,), "text_output")
    except OSError as error:
        outcome.losses.append(f"{type(error).__name__}: {error}; the server has ended: {server.process.poll()}")
    finally:
        proxy.stop()
    return outcome


def at_once(address: str, body: bytes, count: int) -> list[tuple[int, str]]:
    """So many answers to one request. All are there but their last bytes before the first is complete, so slow clients meet as well."""
    connections = [http.client.HTTPConnection(address, timeout=120) for _ in range(count)]
    try:
        for connection in connections:
            connection.putrequest("POST", PATH)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:-1])
        for connection in connections:
            connection.send(body[-1:])
        answers = [connection.getresponse() for connection in connections]
        return [(answer.status, answer.read().decode(errors="replace")) for answer in answers]
    finally:
        for connection in connections:
            connection.close()


def _idle(proxy: Proxy, meanwhile: Callable[[], None]) -> dict[str, float]:
    """As many clients as may be, none of which sends its body to the end. Returns when they were cut off."""
    host, port = proxy.http.split(":")
    started = time.monotonic()
    idle = [socket.create_connection((host, int(port)), 60) for _ in range(CONNECTIONS)]
    try:
        for each in idle:
            each.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.5)
        meanwhile()
        for each in idle:
            each.recv(1000)
        return {"idle clients cut off after, seconds": round(time.monotonic() - started, 1)}
    finally:
        for each in idle:
            each.close()
