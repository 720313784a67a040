"""Served load: 100,000 requests to a real tritonserver on a bank of tiny adapters, while versions change, and 2,000 on SmolLM2.

Each answer is held to what its version's artifact answers outside any server. What is not answered, or refused without cause, is a loss.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.campaign.load import MALFORMED, PATH, WAYS, Key, Load, Truth, in_background, percentiles
from benchmarks.campaign.outcome import Outcome, Size
from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.triton.config import Serving
from flora_export.generate import generate
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.publish import publish
from flora_export.refill import refill
from flora_export.verify.parity import VerifyOptions
from tests.families import make_adapter, make_speaking_base

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "04_triton"), str(ROOT / "examples" / "01_train_ffba")]
from get_server import HOME  # noqa: E402  # found on the path above
from problems import problems  # noqa: E402
from server import Proxy, Server  # noqa: E402

SERVER, SMOLLM2, ADAPTER = ROOT / "models" / "tritonserver", ROOT / "models" / "smollm2", ROOT / "examples" / "01_train_ffba" / "adapter"
REQUESTS: dict[Size, tuple[int, int]] = {"short": (600, 0), "full": (100_000, 2_000)}  # on tiny models, on SmolLM2
CLIENTS, SLOTS, QUEUE = 16, 8, 64
CONNECTIONS = 256  # that nginx.conf allows
MOST = 48  # max_tokens that the server allows
LENGTHS = (1, 4, 12)  # max_tokens that are asked for
FLAT = 0.05  # memory of the second half of a load beside that of the first
NAMES = ("first", "second", "third", "other")  # the last takes the third's place, and gives it back
WORDS = ("what", "answer", "question", "you", "say", "ask", "the", "is")


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    if not (SERVER / HOME).is_dir():
        return [Outcome("served", "each request has its own answer", not_tried=["no tritonserver here: Linux x86-64 alone has one"])]
    tiny, real = REQUESTS[size]
    outcomes = _tiny(work, tiny, seed)
    if real and SMOLLM2.is_dir():
        outcomes.append(_smollm2(work, real, seed))
    elif real:
        outcomes.append(Outcome("served, SmolLM2", "each request has its own answer", not_tried=["models/smollm2 is not there"]))
    return outcomes


def _tiny(work: Path, requests: int, seed: int) -> list[Outcome]:
    base = make_speaking_base(work / "base")
    adapters = {
        name: make_adapter(base, work / name, r=4, seed=n, alpha=32.0) for n, name in enumerate(("first", "second", "third", "other"))
    }
    members = tuple((name, adapters[name]) for name in NAMES[:3])
    bank = build(adapters["first"], str(base), work / "out", BuildOptions(bank=BankOptions(members, slots=4)), _silent)[0]
    other = refill(bank.path, "third", adapters["other"], str(base), work / "out-other", VerifyOptions(), _silent, force=False)[0]
    truth = _truth(bank, other)
    repo = work / "repo"
    publish(bank, repo, Serving(concurrent=SLOTS, threads=1, max_queue=QUEUE, max_tokens=MOST), _silent)
    server = Server(SERVER, repo, log=work / "server.log")
    try:
        server.wait()
        steady = _steady(server, truth, requests * 6 // 10, seed)
        changing = _changing(server, truth, requests * 4 // 10, seed + 1, repo, adapters, base)
        caps = _caps(server, work)
    finally:
        server.stop()
    return [steady, changing, caps]


def _steady(server: Server, truth: Truth, requests: int, seed: int) -> Outcome:
    """One version, all ways of asking, and the server's memory over time."""
    load = Load(server.http, server.grpc, truth, seed, MOST)
    load.truth.sampled = _sampled(load)
    load.run(max(100, requests // 20), CLIENTS)  # until its memory is what it needs
    watched = Memory(server.process.pid)
    started = time.monotonic()
    load.run(requests - max(100, requests // 20), CLIENTS)
    seconds = time.monotonic() - started
    growth = watched.stop()
    load.check({1: "third"})
    outcome = Outcome("served", "each request has its own answer, or a refusal with its cause", sum(load.asked.values()), load.losses)
    outcome.losses += _counted(server)
    if growth is not None and growth > FLAT:
        outcome.losses.append(f"memory grew by {growth:.1%} from the first half of the load to the second")
    outcome.figures = _figures(load, seconds) | {"memory_growth": growth, "memory_bytes": watched.median()}
    return outcome


def _changing(server: Server, truth: Truth, requests: int, seed: int, repo: Path, adapters: dict[str, Path], base: Path) -> Outcome:
    """Adapters are swapped and versions rolled back all the while, by the commands that a user has."""
    contents, changes, done = {1: "third"}, list[str](), threading.Event()
    command = Path(sys.executable).with_name("flora-export")

    def change() -> None:
        latest = 1
        while not done.is_set():
            for content, words in (
                ("other", ["publish-adapter", repo, adapters["other"], "--name", "third", "--base", base]),
                (None, ["triton", repo, "--rollback"]),
                ("other", ["triton", repo, "--to", str(latest + 1)]),
                ("third", ["publish-adapter", repo, adapters["third"], "--name", "third", "--base", base]),
            ):
                if done.is_set() and changes:
                    return
                if words[0] == "publish-adapter":
                    contents[latest + 1 if content == "other" else latest + 2] = str(content)
                subprocess.run([command, *words], check=True, capture_output=True)
                changes.append(str(words[0] if words[0] != "triton" else words[2]))
                done.wait(3)
            latest += 2

    load = Load(server.http, server.grpc, truth, seed, MOST)
    thread, raised = in_background(change)
    started = time.monotonic()
    try:
        load.run(requests, CLIENTS)
    finally:
        done.set()
        thread.join()
    load.check(contents)
    outcome = Outcome("served", "versions and adapters change under load, and no request notices", sum(load.asked.values()), load.losses)
    outcome.losses += [f"a change failed: {error}" for error in raised] + _counted(server)
    outcome.figures = _figures(load, time.monotonic() - started) | {"changes": len(changes), "versions": max(contents)}
    return outcome


def _caps(server: Server, work: Path) -> Outcome:
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

    long = good.replace("2,", f"{MOST},")
    with ThreadPoolExecutor(QUEUE + 3 * SLOTS) as pool:
        found = list(pool.map(lambda _: ask(server.http, long), range(QUEUE + 3 * SLOTS)))
    for each in found:
        expect("more than the queue holds", each, (200, 503), "text_output" if each[0] == 200 else "Exceeds maximum queue size")
    outcome.figures["more than the queue holds"] = {str(status): n for status, n in sorted(Counter(status for status, _ in found).items())}
    if {status for status, _ in found} != {200, 503}:
        outcome.losses.append(f"of {len(found)} at once none was refused, or all: {outcome.figures}")
    expect("max_tokens", ask(server.http, good.replace("2,", f"{MOST + 1},")), (400,), f"must be between 1 and {MOST}")
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


def _smollm2(work: Path, requests: int, seed: int) -> Outcome:
    artifact = build(ADAPTER, str(SMOLLM2), work / "smollm2", BuildOptions(), _silent)[0]
    questions = [problem.question for problem in problems(24, test=True, seed=seed)]
    texts: dict[Key, str] = {}
    for most in (1, 4, 8):
        answers = generate(artifact, questions, max_new_tokens=most, runtime="decoder")
        texts |= {("", question, most): answer.text for question, answer in zip(questions, answers, strict=True)}
    truth = Truth({"it": texts})
    publish(artifact, work / "smollm2-repo", Serving(concurrent=SLOTS, max_tokens=MOST), _silent)
    server = Server(SERVER, work / "smollm2-repo", log=work / "smollm2.log")
    load = Load(server.http, server.grpc, truth, seed, MOST)
    try:
        server.wait()
        started = time.monotonic()
        load.run(requests, SLOTS, {"whole": 80, "streamed": 12, "malformed": 4, "cancelled": 2, "slow": 2})
        seconds = time.monotonic() - started
        load.check({1: "it"})
        losses = load.losses + _counted(server)
    finally:
        server.stop()
    outcome = Outcome("served, SmolLM2", "each request has its own answer, or a refusal with its cause", requests, losses)
    outcome.figures = _figures(load, seconds)
    return outcome


def _truth(bank: Artifact, other: Artifact) -> Truth:
    chance = np.random.default_rng(0)
    prompts = [" ".join(chance.choice(WORDS, length)) for length in (1, 2, 3, 5, 8, 13, 21, 34, 55, 600)]  # the last is read in parts
    who = ("first", "second", "third", "base")
    texts: dict[str, dict[Key, str]] = {}
    for content, artifact in (("third", bank), ("other", other)):
        texts[content] = {}
        for most in LENGTHS:
            pairs = list(product(who, prompts))
            answers = generate(artifact, [p for _, p in pairs], max_new_tokens=most, adapters=[w for w, _ in pairs], runtime="decoder")
            texts[content] |= {(*pair, most): answer.text for pair, answer in zip(pairs, answers, strict=True)}
    long = {key: text for key, text in texts["third"].items() if key[2] == LENGTHS[-1]}
    if len(set(long.values())) < len(long) * 9 // 10:
        raise RuntimeError("the adapters and prompts answer alike: answers could be mixed up unseen")
    decoder, logits = Decoder(bank), {}
    rows = [chance.integers(5, 250, length).tolist() for length in (4, 4, 4, 9, 9, 17)]
    for slot, row in product((0, 1, -1), range(len(rows))):
        decoder.choice.choose(slot)
        logits[slot, row] = decoder.start([rows[row]])[0][-1]
    shapes = {tensor.name: tensor.shape for tensor in bank.manifest.inputs if tensor.name.startswith("past_key_values.")}
    caches = {name: (int(shape[1]), int(shape[3])) for name, shape in shapes.items()}
    return Truth(texts, rows, logits, frozenset({"first", "second", "base"}), {}, caches)


def _sampled(load: Load) -> dict[Key, str]:
    """What the idle server draws with a seed."""
    keys = [key for key in next(iter(load.truth.texts.values())) if key[0] in load.truth.fixed and key[2] == LENGTHS[-1]]
    return {key: load._post(PATH, load._body(key, temperature=0.8, seed=7))[1]["text_output"] for key in keys}


def _counted(server: Server) -> list[str]:
    """Whether the server says itself that something broke."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    broken = sum(map(float, re.findall(r'^flora_generate_requests\{[^}]*end="internal"[^}]*\} (\S+)$', text, re.MULTILINE)))
    return [f"the server counts {broken:.0f} internal errors"] if broken else []


def _figures(load: Load, seconds: float) -> dict[str, Any]:
    return {
        "requests": dict(load.asked),
        "requests_per_second": round(sum(load.asked.values()) / seconds, 1),
        "milliseconds": {way: percentiles(load.seconds[way]) for way in WAYS if load.seconds[way]},
        "malformed_bodies": len(MALFORMED),
    }


class Memory:
    """The resident memory of a process and of what it has started, every second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._samples, self._stopped = pid, list[int](), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            self._samples.append(sum(map(_resident, _family(self._pid))))

    def median(self) -> float:
        return statistics.median(self._samples) if self._samples else 0

    def stop(self) -> float | None:
        """By how much the second half's median is above the first half's; None where there are too few samples."""
        self._stopped.set()
        self._thread.join()
        half = len(self._samples) // 2
        return None if half < 10 else statistics.median(self._samples[half:]) / statistics.median(self._samples[:half]) - 1


def _family(pid: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        children += map(int, file.read_text().split())
    return [pid, *(each for child in children for each in _family(child))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0


def _silent(what: str, done: int, of: int) -> None:
    """A build's progress, which nobody reads here."""
