"""Served load: 100,000 requests to a real tritonserver on a bank of tiny adapters, while versions change, and 2,000 on SmolLM2.

Each answer is held to what its version's artifact answers outside any server. What is not answered, or refused without cause, is a loss.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.campaign.caps import Limits, try_caps
from benchmarks.campaign.load import MALFORMED, PATH, WAYS, Key, Load, Truth, in_background, percentiles, throughput
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
from server import Server  # noqa: E402

SERVER, SMOLLM2, ADAPTER = ROOT / "models" / "tritonserver", ROOT / "models" / "smollm2", ROOT / "examples" / "01_train_ffba" / "adapter"
REQUESTS: dict[Size, tuple[int, int]] = {"short": (600, 0), "full": (100_000, 2_000)}  # on tiny models, on SmolLM2
CLIENTS, SLOTS, QUEUE = 16, 8, 64
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
        caps = try_caps(server, work, Limits(MOST, SLOTS, QUEUE))
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
    outcome.figures = _figures(load, seconds) | _throughput(load, 64) | {"memory_growth": growth, "memory_bytes": watched.median()}
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
        figures = _figures(load, seconds) | _throughput(load, 24)
        losses = load.losses + _counted(server)
    finally:
        server.stop()
    outcome = Outcome("served, SmolLM2", "each request has its own answer, or a refusal with its cause", requests, losses)
    outcome.figures = figures
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


def _throughput(load: Load, requests: int) -> dict[str, Any]:
    """Tokens a second with one client and with as many as the server works on; the median of three rounds of both, in turns."""
    short = [key for key in load.truth.texts[next(iter(load.truth.texts))] if key[2] == max(LENGTHS) or not key[0]]
    keys = [key for key in short if len(key[1]) < 500]
    bodies = [load._body((*keys[n % len(keys)][:2], 32)) for n in range(requests)]
    rounds = [{clients: throughput(load.http, bodies, clients) for clients in (1, SLOTS)} for _ in range(3)]
    medians = {clients: statistics.median(each[clients] for each in rounds) for clients in (1, SLOTS)}
    return {"tokens_per_second": {str(k): round(v, 1) for k, v in medians.items()}, "gain": round(medians[SLOTS] / medians[1], 2)}


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
