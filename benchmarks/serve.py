"""What a tritonserver on this machine delivers with `generate`: requests and tokens per second, and how long clients wait.

python benchmarks/serve.py --artifact out/demo --server models/tritonserver

Each client streams one answer after the other over gRPC (tritonclient). The server and its clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from common import write_result

from flora_export.artifact import open_artifact
from flora_export.backends.triton.config import Serving
from flora_export.publish import publish

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "04_triton"), str(EXAMPLES / "01_train_ffba")]
from get_server import PACKAGE  # noqa: E402  # found on the path above
from problems import problems  # noqa: E402
from server import Server  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--server", type=Path, required=True)
    parser.add_argument("--concurrency", default="1,2,4,8", help="numbers of clients")
    parser.add_argument("--requests", type=int, default=64, help="of each number of clients, after as many as clients to warm up")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    clients = [int(number) for number in options.concurrency.split(",")]
    artifact = open_artifact(options.artifact)
    serving = Serving(concurrent=max(clients))
    with tempfile.TemporaryDirectory() as work:
        publish(artifact, Path(work) / "repo", serving, lambda *_: None)
        server = Server(options.server, Path(work) / "repo", log=Path(work) / "log")
        try:
            server.wait()
            with urllib.request.urlopen(f"http://{server.http}/v2") as answer:
                version = json.load(answer)["version"]
            levels = [measure(server.grpc, n, options.requests, options.max_tokens) for n in clients]
        finally:
            server.stop()
    write_result(
        "serve",
        {
            "what": "generate, streamed over gRPC, greedy; the decoder model was loaded beside it and idle",
            "server": {
                "tritonserver": version,
                "package": re.search(r"^\S+==\S+", PACKAGE.read_text(), re.M)[0],
                "concurrent_requests": serving.concurrent,
                "instances": serving.instances,
            },
            "artifact": {key: getattr(artifact.manifest, key) for key in ("target", "precision", "fuse", "versions")}
            | {"base": artifact.manifest.base["name"], "bytes": artifact.manifest.files["model.onnx.data"]["bytes"]},
            "requests": options.requests,
            "max_tokens": options.max_tokens,
            "levels": levels,
        },
    )


def measure(address: str, clients: int, requests: int, max_tokens: int, adapters: Sequence[str] = ()) -> dict[str, Any]:
    """One number of clients, each asking again as soon as it has its answer. Seconds; percentiles over requests.

    Of a bank, the requests go to `adapters` in turn.
    """
    questions: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
    turn = itertools.cycle(adapters or [None])
    for problem in problems(requests, test=True, seed=clients):
        questions.put((problem.question, next(turn)))
    warm = problems(clients, test=True, seed=0)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda problem: _ask(address, [(problem.question, next(turn))], max_tokens), warm))
        started = time.perf_counter()
        found = [answer for part in pool.map(lambda _: _ask(address, questions, max_tokens), range(clients)) for answer in part]
        seconds = time.perf_counter() - started
    assert len(found) == requests
    tokens = sum(new for *_, new in found)
    level = {"clients": clients, "requests_per_second": requests / seconds, "tokens_per_second": tokens / seconds, "tokens": tokens}
    return level | {
        "first_piece": _percentiles([first for first, *_ in found]),
        "whole_answer": _percentiles([whole for _, whole, _ in found]),
    }


def _ask(address: str, questions: Any, max_tokens: int) -> list[tuple[float, float, int]]:
    """Ask until there are no questions left. Returns (seconds to the first piece, to the last, new tokens) of each."""
    results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client = triton.InferenceServerClient(address)
    client.start_stream(lambda result, error: results.put((result, error)))
    stream = triton.InferInput("stream", [1], "BOOL").set_data_from_numpy(np.array([True]))
    found = []
    waiting = list(questions) if isinstance(questions, list) else None
    while True:
        try:
            question, adapter = waiting.pop() if waiting is not None else questions.get_nowait()
        except (IndexError, queue.Empty):
            break
        text = triton.InferInput("text_input", [1], "BYTES").set_data_from_numpy(np.array([question.encode()], np.object_))
        started, first = time.perf_counter(), 0.0
        own = {} if adapter is None else {"adapter": adapter}
        client.async_stream_infer("generate", [text, stream], parameters={"max_tokens": max_tokens, **own})
        while True:
            result, error = results.get()
            if error is not None:
                raise error
            first = first or time.perf_counter() - started
            if (new := result.as_numpy("new_tokens")) is not None:
                break
        found.append((first, time.perf_counter() - started, int(new[0])))
    client.stop_stream()
    client.close()
    return found


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p99": float(np.percentile(values, 99)), "max": max(values)}


if __name__ == "__main__":
    main()
