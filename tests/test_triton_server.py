"""A real tritonserver on a published repository, over HTTP and gRPC. The model is tiny and random, with a tokenizer of its own."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import queue
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.triton.config import Serving
from flora_export.backends.triton.repository import make_live
from flora_export.generate import generate
from flora_export.pipeline import BuildOptions, build
from flora_export.publish import publish, roll_back
from tests.conftest import ADAPTER, silent
from tests.families import make_adapter, make_speaking_base

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "04_triton"))
from get_server import HOME  # noqa: E402  # found on the path above
from server import Proxy, Server  # noqa: E402

SERVER = Path(os.environ.get("FLORA_TRITONSERVER", ROOT / "models" / "tritonserver"))
grpc = pytest.importorskip("tritonclient.grpc", reason="extra triton is not installed")
tritonhttp = pytest.importorskip("tritonclient.http", reason="extra triton is not installed")
if not (SERVER / HOME).is_dir():
    pytest.skip(f"no tritonserver at {SERVER}: make models/tritonserver gets it on Linux x86-64", allow_module_level=True)

QUESTION = "what is the answer?"
SLOTS = 4
TOLERANCE = 1e-5  # fp32, logits of scale 1: the same graph in the same runtime


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Two adapters of one base: what they answer differs."""
    root = tmp_path_factory.mktemp("triton")
    base = make_speaking_base(root / "base")
    made = []
    for seed in (1, 2):
        adapter = make_adapter(base, root / f"adapter{seed}", seed=seed, alpha=32.0)
        made.append(build(adapter, str(base), root / f"out{seed}", BuildOptions(), silent)[0])
    return made


@pytest.fixture(scope="module")
def repo(artifacts: list[Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("served") / "repo"
    publish(artifacts[0], repo, Serving(concurrent=SLOTS, threads=1), silent)
    return repo


@pytest.fixture(scope="module")
def server(repo: Path) -> Iterator[Server]:
    running = Server(SERVER, repo, log=repo.parent / "server.log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def post(server: Server, content: dict[str, Any], path: str = "generate", version: int | None = None) -> tuple[int, Any]:
    """Status and answer; a list of them where the answer is a stream."""
    at = f"http://{server.http}/v2/models/generate/{f'versions/{version}/' if version else ''}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(at, json.dumps(content).encode()), timeout=60) as answer:
            status, body = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read().decode()
    if path == "generate_stream" and status == 200:
        return status, [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line]
    return status, json.loads(body)


def ask(server: Server, text: str, **parameters: Any) -> str:
    status, answer = post(server, {"text_input": text, **parameters})
    assert status == 200, answer
    return str(answer["text_output"])


def tensors(module: Any, given: dict[str, Any]) -> list[Any]:
    """Inputs of a client, of an array's own type."""
    inputs = []
    for name, value in given.items():
        array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.asarray(value)
        kind = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "bool": "BOOL", "object": "BYTES"}[str(array.dtype)]
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def stream(server: Server, given: dict[str, Any], parameters: dict[str, Any] | None = None) -> tuple[list[Any], Exception | None]:
    """What a gRPC stream of one request answers, up to its end or error."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    client = grpc.InferenceServerClient(server.grpc)
    client.start_stream(lambda result, error: results.put((result, error)))
    pieces = []
    client.async_stream_infer("generate", tensors(grpc, given), parameters=parameters, enable_empty_final_response=True)
    try:
        while True:
            result, error = results.get(timeout=60)
            if error is not None:
                return pieces, error
            pieces.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return pieces, None
    finally:
        client.stop_stream()
        client.close()


def expected(artifact: Artifact, text: str, tokens: int) -> str:
    return generate(artifact, [text], max_new_tokens=tokens)[0].text


# decoder


def test_decoder_is_the_artifact_over_http_and_grpc(server: Server, artifacts: list[Artifact]) -> None:
    """Prefill on an empty cache and a cached step, a batch of two: the logits of the artifact's decoder, and not the base's."""
    ids = np.array([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]], np.int64)
    own, bare = Decoder(artifacts[0]), Decoder(artifacts[0], adapter=False)
    logits, step = np.stack(own.start(ids.tolist())), own.step([30, 31])
    silenced = np.stack(bare.start(ids.tolist()))
    cache = {name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32) for name, value in own.cache_inputs.items()}
    for module, address in ((grpc, server.grpc), (tritonhttp, server.http)):
        client = module.InferenceServerClient(address)
        result = client.infer("decoder", tensors(module, {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache}))
        np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=0, atol=TOLERANCE)
        assert np.abs(result.as_numpy("logits") - silenced).max() > 100 * TOLERANCE
        kept = {name: result.as_numpy(name.replace("past_key_values.", "present.")) for name in cache}
        feeds = {"input_ids": np.array([[30], [31]], np.int64), "attention_mask": np.ones((2, 6), np.int64), **kept}
        result = client.infer("decoder", tensors(module, feeds))
        np.testing.assert_allclose(result.as_numpy("logits")[:, -1], step, rtol=0, atol=TOLERANCE)
        client.close()


def test_decoder_joins_requests_and_mixes_nothing_up(server: Server, artifacts: list[Artifact]) -> None:
    own = Decoder(artifacts[0])
    cache = {name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for name, value in own.cache_inputs.items()}
    rows = np.random.default_rng(0).integers(5, 250, size=(32, 1, 6))
    client = grpc.InferenceServerClient(server.grpc)

    def run(ids: Any) -> Any:
        return client.infer("decoder", tensors(grpc, {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache})).as_numpy("logits")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, rows))
    for ids, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer[0], own.start(ids.tolist())[0], rtol=0, atol=TOLERANCE)
    client.close()


BAD_DECODER: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("type", lambda f: f | {"input_ids": f["input_ids"].astype(np.int32)}, "data-type"),
    ("rank", lambda f: f | {"input_ids": f["input_ids"][0]}, "input_ids"),
    ("heads", lambda f: {n: a[:, :1] if "past" in n else a for n, a in f.items()}, "past_key_values"),
    ("missing", lambda f: {n: a for n, a in f.items() if n != "attention_mask"}, "expected"),
    ("unknown", lambda f: f | {"nonsense": f["input_ids"]}, "nonsense"),
    ("batch", lambda f: {n: np.repeat(a, 9, axis=0) for n, a in f.items()}, "batch-size must be <= 8"),
    ("mask", lambda f: f | {"attention_mask": np.ones((1, 1), np.int64)}, ""),  # the runtime's own words
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD_DECODER], ids=[case[0] for case in BAD_DECODER])
def test_decoder_refuses_wrong_inputs(server: Server, artifacts: list[Artifact], change: Callable[..., Any], message: str) -> None:
    own = Decoder(artifacts[0])
    ids = np.array([[5, 6, 7]], np.int64)
    feeds: dict[str, Any] = {n: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for n, v in own.cache_inputs.items()}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for module, address in ((grpc, server.grpc), (tritonhttp, server.http)):
        client = module.InferenceServerClient(address)
        with pytest.raises(module.InferenceServerException) as caught:
            client.infer("decoder", tensors(module, change(feeds)))
        assert message in str(caught.value)
        assert client.infer("decoder", tensors(module, feeds)).as_numpy("logits").shape == (
            1,
            3,
            own.artifact.manifest.outputs[0].shape[-1],
        )
        client.close()


# generate


def test_generate_answers_as_the_artifact_does(server: Server, artifacts: list[Artifact]) -> None:
    """Whole and streamed, over HTTP and gRPC: what flora-export generate answers, token for token."""
    wanted = generate(artifacts[0], [QUESTION], max_new_tokens=40)[0]
    assert wanted.text != generate(artifacts[0], [QUESTION], max_new_tokens=40, adapter=False)[0].text
    status, whole = post(server, {"text_input": QUESTION, "max_tokens": 40})
    assert status == 200
    assert (whole["text_output"], whole["new_tokens"], whole["prompt_tokens"]) == (wanted.text, wanted.new_tokens, wanted.prompt_tokens)
    assert whole["finish_reason"] == ("length" if wanted.new_tokens == 40 else "stop")
    status, pieces = post(server, {"text_input": QUESTION, "max_tokens": 40, "stream": True}, "generate_stream")
    assert "".join(piece["text_output"] for piece in pieces) == wanted.text
    assert len(pieces) > 10
    assert [piece.get("finish_reason") for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    results, error = stream(server, {"text_input": QUESTION, "max_tokens": np.array([40], np.int32), "stream": np.array([True])})
    assert error is None
    texts = [result.as_numpy("text_output")[0].decode() for result in results]
    assert texts == [piece["text_output"] for piece in pieces]
    results, error = stream(server, {"text_input": QUESTION}, {"max_tokens": 40})
    assert error is None
    assert [result.as_numpy("text_output")[0].decode() for result in results] == [wanted.text]


def test_generate_takes_raw_text_and_conversations(server: Server, artifacts: list[Artifact]) -> None:
    raw = generate(artifacts[0], [QUESTION], max_new_tokens=12, chat=False)[0].text
    assert ask(server, QUESTION, max_tokens=12, chat=False) == raw != ask(server, QUESTION, max_tokens=12)
    messages = json.dumps([{"role": "user", "content": QUESTION}])
    assert post(server, {"messages": messages, "max_tokens": 12})[1]["text_output"] == ask(server, QUESTION, max_tokens=12)
    longer = json.dumps(
        [{"role": "user", "content": "you"}, {"role": "assistant", "content": "say"}, {"role": "user", "content": QUESTION}]
    )
    assert post(server, {"messages": longer, "max_tokens": 12})[1]["prompt_tokens"] > 12


def test_generate_samples(server: Server) -> None:
    greedy = ask(server, QUESTION, max_tokens=24)
    assert ask(server, QUESTION, max_tokens=24, top_k=1, temperature=2.0) == greedy
    assert ask(server, QUESTION, max_tokens=24, top_p=1e-6, seed=3) == greedy
    first = [ask(server, QUESTION, max_tokens=24, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    assert len({*first, greedy}) == 4
    assert [ask(server, QUESTION, max_tokens=24, temperature=1.0, seed=seed) for seed in (1, 2, 3)] == first
    with ThreadPoolExecutor(6) as pool:  # a seed's answer depends on nothing beside it
        again = list(pool.map(lambda seed: ask(server, QUESTION, max_tokens=24, temperature=1.0, seed=seed), (1, 2, 3, 3, 2, 1)))
    assert again == [*first, *reversed(first)]
    assert len({ask(server, QUESTION, max_tokens=24, temperature=1.0) for _ in range(3)}) == 3  # no seed: another one each time


def test_generate_stops(server: Server, artifacts: list[Artifact]) -> None:
    text = expected(artifacts[0], QUESTION, 40)
    stop = text[9:12]
    cut = text[: text.index(stop)]
    status, answer = post(server, {"text_input": QUESTION, "max_tokens": 40, "stop": ["never", stop]})
    assert (status, answer["text_output"], answer["finish_reason"]) == (200, cut, "stop")
    _, pieces = post(server, {"text_input": QUESTION, "max_tokens": 40, "stop": [stop], "stream": True}, "generate_stream")
    assert "".join(piece["text_output"] for piece in pieces) == cut


BAD_GENERATE: list[tuple[dict[str, Any], str]] = [
    ({}, "text_input or messages"),
    ({"text_input": "a", "messages": "[]"}, "text_input or messages"),
    ({"text_input": "a", "nonsense": 1}, "unknown parameter nonsense; there are adapter, chat, max_tokens"),
    ({"text_input": "a", "parameters": {"nonsense": 1}}, "unknown parameter nonsense"),
    ({"text_input": "a", "adapter": "first"}, "adapter was given, but this model holds one adapter alone"),
    ({"text_input": "a", "max_tokens": "many"}, "Unable to parse"),
    ({"text_input": "a", "max_tokens": 0}, "max_tokens is 0, but must be between 1"),
    ({"text_input": "a", "max_tokens": [1, 2]}, "max_tokens"),
    ({"text_input": ["a", "b"]}, "text_input"),
    ({"text_input": "a", "temperature": -1.0}, "temperature is -1.0"),
    ({"text_input": "a", "top_p": 0.0}, "top_p is 0.0, but must be above 0"),
    ({"text_input": "a", "top_k": -3}, "top_k is -3"),
    ({"text_input": "a", "stop": [""]}, "stop is"),
    ({"text_input": "what " * 3000}, "but the context holds 2048"),
    ({"text_input": "a" * 200_000}, "characters is too long for 2048 tokens"),
    ({"text_input": "", "chat": False}, "the prompt is empty"),
    ({"messages": "nonsense"}, "messages is not JSON"),
    ({"messages": '[{"role": "user"}]'}, "messages must be a list"),
]


@pytest.mark.parametrize(("content", "message"), BAD_GENERATE, ids=[case[1] for case in BAD_GENERATE])
def test_generate_refuses_wrong_requests(server: Server, content: dict[str, Any], message: str) -> None:
    status, answer = post(server, content)
    assert status == (500 if message == "Unable to parse" else 400)  # the server itself says 500 to JSON of the wrong type
    assert message in answer["error"]
    assert post(server, {"text_input": QUESTION, "max_tokens": 2})[0] == 200


def test_generate_refuses_wrong_tensors_over_grpc(server: Server) -> None:
    for given, message in (
        ({"text_input": np.array([1], np.int32)}, "data-type"),
        ({"text_input": QUESTION, "max_tokens": np.array([1.5], np.float32)}, "data-type"),
        ({"text_input": QUESTION, "max_tokens": np.array([1, 2], np.int32)}, "max_tokens"),
        ({"text_input": QUESTION, "nonsense": np.array([1], np.int32)}, "nonsense"),
        ({"text_input": QUESTION, "adapter": "base"}, "adapter"),
        ({"text_input": QUESTION, "temperature": np.array([np.nan], np.float32)}, "temperature is nan"),
        ({"text_input": np.array([b"\xff\xfe"], np.object_)}, "not UTF-8"),
    ):
        pieces, error = stream(server, given)
        assert not pieces
        assert message in str(error)
    assert stream(server, {"text_input": QUESTION}, {"max_tokens": 2})[1] is None


@pytest.fixture(scope="module")
def proxy(server: Server, repo: Path) -> Iterator[Proxy]:
    if shutil.which("nginx") is None:
        pytest.skip("no nginx here: make server-dependencies installs it on Debian")
    running = Proxy(server, repo.parent / "nginx")
    yield running
    running.stop()


def raw_post(address: str, body: str, path: str = "/v2/models/generate/generate") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_recipe_lets_questions_through(proxy: Proxy, artifacts: list[Artifact]) -> None:
    body = json.dumps({"text_input": QUESTION, "max_tokens": 8})
    assert raw_post(proxy.http, body)[1]["text_output"] == expected(artifacts[0], QUESTION, 8)
    connection = http.client.HTTPConnection(proxy.http, timeout=60)
    connection.request("POST", "/v2/models/generate/generate_stream", json.dumps({"text_input": QUESTION, "max_tokens": 8, "stream": True}))
    pieces = [json.loads(line[6:]) for line in connection.getresponse().read().splitlines() if line]
    assert "".join(piece["text_output"] for piece in pieces) == expected(artifacts[0], QUESTION, 8)
    assert len(pieces) > 4


def test_the_recipe_keeps_out_what_would_end_the_server(server: Server, proxy: Proxy, artifacts: list[Artifact]) -> None:
    """Bodies that are too large, and brackets as many as fit: each has its answer, and the server goes on."""
    limit = 2**20
    assert raw_post(proxy.http, json.dumps({"text_input": "a" * limit})) == (413, {"error": "a body may have 1 MiB"})
    for body in ("[" * limit, '{"a":' * (limit // 5), '{"text_input":' + "[" * (limit // 2 - 8) + "]" * (limit // 2 - 8) + "}"):
        status, answer = raw_post(proxy.http, body)
        assert status in (400, 500)
        assert "error" in answer
    for path in ("/v2/models/decoder/infer", "/v2/repository/index", "/v2/models/generate/stats", "/v2/systemsharedmemory/status"):
        assert raw_post(proxy.http, "{}", path)[0] == 404
    assert raw_post(server.http, json.dumps({"text_input": QUESTION, "max_tokens": 8}))[1]["text_output"] == expected(
        artifacts[0], QUESTION, 8
    )


def test_the_recipe_answers_for_its_health_while_all_places_are_taken(proxy: Proxy) -> None:
    host, _, port = proxy.http.partition(":")
    head = b"POST /v2/models/generate/generate HTTP/1.1\r\nHost: generate\r\nContent-Length: 1000\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for _ in range(256):  # a place each, once its head has come
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60)).sendall(head)
        wait_until(lambda: raw_post(proxy.http, "{}")[0] == 503)
        with urllib.request.urlopen(f"http://{proxy.http}/v2/health/live", timeout=60) as answer:
            assert answer.status == 200


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end


def test_an_answer_ends_with_the_context(server: Server) -> None:
    status, answer = post(server, {"text_input": "what " * 1990, "max_tokens": 10_000, "chat": False})
    assert (status, answer["finish_reason"]) == (200, "length")
    assert answer["prompt_tokens"] + answer["new_tokens"] == 2048


def cancelled(server: Server) -> float:
    """How many requests `generate` has given up."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r'^flora_generate_requests\{[^}]*end="cancelled"[^}]*\} (\S+)$', text, re.MULTILINE)
    assert found, text
    return sum(map(float, found))


def test_clients_that_go_away(server: Server) -> None:
    """More of them than there are slots, on both protocols, in the middle of long answers: their slots come free, and others are served."""
    before = cancelled(server)
    for _ in range(SLOTS + 1):
        connection = http.client.HTTPConnection(server.http, timeout=30)
        body = json.dumps({"text_input": QUESTION, "max_tokens": 2000, "stream": True})
        connection.request("POST", "/v2/models/generate/generate_stream", body)
        assert connection.getresponse().readline().startswith(b"data: ")
        connection.close()
    _expect_cancelled(server, before + SLOTS + 1)
    before = cancelled(server)
    for _ in range(SLOTS + 1):
        came = threading.Event()
        client = grpc.InferenceServerClient(server.grpc)
        client.start_stream(lambda result, error, came=came: came.set())
        client.async_stream_infer(
            "generate", tensors(grpc, {"text_input": QUESTION, "stream": np.array([True])}), parameters={"max_tokens": 2000}
        )
        assert came.wait(30)
        client.stop_stream(cancel_requests=True)
        client.close()
    _expect_cancelled(server, before + SLOTS + 1)
    first = ask(server, QUESTION, max_tokens=8)
    assert first == ask(server, QUESTION, max_tokens=8)


def _expect_cancelled(server: Server, count: float) -> None:
    """Long answers that nobody reads are given up."""
    end = time.monotonic() + 30
    while cancelled(server) < count and time.monotonic() < end:
        time.sleep(0.1)
    assert cancelled(server) == count


def test_two_hundred_requests_at_once(server: Server, artifacts: list[Artifact]) -> None:
    """Each of 200 concurrent requests gets the answer that it would get alone; half of them streamed."""
    words = ("what", "answer", "question", "you", "say", "ask", "the", "is")
    prompts = [f"{a} {b} {n}" for n, (a, b) in enumerate(itertools.product(words * 2, words * 2))][:200]
    wanted = {p: answer.text for p, answer in zip(prompts, generate(artifacts[0], prompts, max_new_tokens=16), strict=True)}
    assert len(set(wanted.values())) > 100

    def run(index: int) -> tuple[str, str]:
        prompt = prompts[index]
        content = {"text_input": prompt, "max_tokens": 16, "stream": index % 2 == 0}
        status, answer = post(server, content, "generate_stream" if index % 2 == 0 else "generate")
        assert status == 200, answer
        pieces = answer if isinstance(answer, list) else [answer]
        return prompt, "".join(piece["text_output"] for piece in pieces)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(run, range(200)))
    assert len(answers) == 200
    assert all(text == wanted[prompt] for prompt, text in answers)


# the repository under a running server: these come last, and leave version 1 live


class Load:
    """Clients that ask all the time, and what they got: (version, text)."""

    def __init__(self, server: Server, clients: int = 4) -> None:
        self.server, self.timed, self.stopped = server, list[tuple[float, int, str]](), False  # when it was asked, version, text
        self.pool = ThreadPoolExecutor(clients)
        self.running = [self.pool.submit(self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self.stopped:
            asked = time.monotonic()
            status, answer = post(self.server, {"text_input": QUESTION, "max_tokens": 8})
            assert status == 200, answer
            self.timed.append((asked, int(answer["model_version"]), answer["text_output"]))

    @property
    def answers(self) -> list[tuple[int, str]]:
        return [(version, text) for _, version, text in self.timed]

    def until(self, version: int) -> None:
        """Wait until a client that asks from now on is answered by that version; an answer may come late from one that was live before."""
        now = time.monotonic()
        end = now + 60
        while not any(v == version and asked > now for asked, v, _ in list(self.timed)):
            assert time.monotonic() < end, f"version {version} never answered"
            assert not any(job.done() for job in self.running), [job.exception() for job in self.running if job.done()]
            time.sleep(0.05)

    def stop(self) -> None:
        self.stopped = True
        for job in self.running:
            job.result(60)
        self.pool.shutdown()


def test_versions_change_under_load(server: Server, repo: Path, artifacts: list[Artifact]) -> None:
    """A new version goes live, and the old one comes back: no request fails, and each answer is its version's."""
    wanted = {1: expected(artifacts[0], QUESTION, 8), 2: expected(artifacts[1], QUESTION, 8)}
    assert wanted[1] != wanted[2]
    load = Load(server)
    load.until(1)
    assert publish(artifacts[1], repo, Serving(concurrent=SLOTS, threads=1), silent).version == 2
    load.until(2)
    assert roll_back(repo, None).version == 1
    load.until(1)
    load.stop()
    assert set(load.answers) == set(wanted.items())


def test_a_version_damaged_on_disk_is_not_loaded(server: Server, repo: Path, artifacts: list[Artifact]) -> None:
    """Somebody copies a configuration by hand, past all checks, and a weight of that version is damaged: version 1 goes on."""
    weights = repo / "generate" / "2" / "model.onnx.data"
    whole = weights.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 4
    weights.write_bytes(damaged)
    config = repo / "generate" / "config.pbtxt"
    text = config.read_text()
    try:
        config.write_text((repo / "generate" / "2" / "config.pbtxt").read_text())
        end = time.monotonic() + 60
        log = repo.parent / "server.log"
        while "model.onnx.data is not the file that was published" not in log.read_text(errors="replace"):
            assert time.monotonic() < end
            assert ask(server, QUESTION, max_tokens=8) == expected(artifacts[0], QUESTION, 8)
            time.sleep(0.2)
        assert ask(server, QUESTION, max_tokens=8) == expected(artifacts[0], QUESTION, 8)
    finally:
        weights.write_bytes(whole)
        config.write_text(text)


def test_a_server_that_is_told_to_load(artifacts: list[Artifact], tmp_path: Path) -> None:
    """The way of production, with two instances: a version is live once the server was told, and no request fails meanwhile."""
    repo = tmp_path / "repo"
    publish(artifacts[0], repo, Serving(instances=2, threads=1), silent)
    told = Server(SERVER, repo, log=tmp_path / "log", poll=None)
    try:
        told.wait()
        load = Load(told, clients=2)
        publish(artifacts[1], repo, Serving(instances=2, threads=1), silent)
        load.until(1)
        for model in ("decoder", "generate"):
            urllib.request.urlopen(f"http://{told.http}/v2/repository/models/{model}/load", data=b"{}", timeout=60).close()
        load.until(2)
        load.stop()
        assert set(load.answers) == {(n + 1, expected(artifact, QUESTION, 8)) for n, artifact in enumerate(artifacts)}
        with urllib.request.urlopen(f"http://{told.metrics}/metrics", timeout=10) as answer:
            counted = re.findall(
                r'^flora_generate_requests\{[^}]*end="(?:length|stop)"[^}]*version="2"[^}]*\} (\S+)$', answer.read().decode(), re.M
            )
        served = sum(version == 2 for version, _ in load.answers)
        assert sum(map(float, counted)) == served + 2  # and a warm-up in each instance
    finally:
        told.stop()


@pytest.mark.skipif(np.__version__ < "2", reason="NumPy 2 is what it is about")
def test_a_server_that_cannot_read_numpy_2_loads_no_generate(repo: Path, tmp_path: Path) -> None:
    """This server's Python backend reads NumPy 2's arrays wrongly and says nothing: the warm-up finds it, before clients do."""
    wrong = Server(SERVER, repo, log=tmp_path / "log", python=Path(sys.executable).parent)
    with pytest.raises(RuntimeError, match="did not become ready"):
        wrong.wait()
    log = (tmp_path / "log").read_text(errors="replace")
    assert "deserialize_bytes_tensor" in log  # where it falls over the warm-up's text
    assert "successfully loaded 'generate'" not in log


def test_a_restarted_server_serves_what_is_live(server: Server, repo: Path, artifacts: list[Artifact]) -> None:
    """Another server on the same repository, after another version went live; then it is ended and started again."""
    assert publish(artifacts[1], repo, Serving(concurrent=1, threads=1, max_queue=2), silent).version == 3
    for _ in range(2):
        again = Server(SERVER, repo, log=repo.parent / "again.log")
        try:
            again.wait()
            assert ask(again, QUESTION, max_tokens=8) == expected(artifacts[1], QUESTION, 8)
            _overload(again)
        finally:
            assert again.stop() == 0
    make_live(repo, 1)


def _overload(server: Server) -> None:
    """One slot and a queue of two: of twelve requests some are refused at once, and say why; the others are answered."""
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: post(server, {"text_input": QUESTION, "max_tokens": 600}), range(12)))
    refused = [answer["error"] for status, answer in answers if status != 200]
    assert refused
    assert all("maximum queue size" in error for error in refused)
    assert len({answer["text_output"] for status, answer in answers if status == 200}) == 1


@pytest.mark.real
def test_the_example_over_http(smollm2: Path, tmp_path: Path) -> None:
    """`build --backend triton` on SmolLM2: the server loads the repository with no edits, and streams what the adapter was trained for."""
    repo = tmp_path / "repo"
    from click.testing import CliRunner

    from flora_export.cli import main

    command = ["build", str(ADAPTER), "--base", str(smollm2), "--backend", "triton", "--output", str(repo), "--quick", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verified"] is True
    running = Server(SERVER, repo, log=tmp_path / "server.log")
    try:
        running.wait()
        question = "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?"
        _, pieces = post(running, {"text_input": question, "stream": True}, "generate_stream")
        assert "".join(piece["text_output"] for piece in pieces) == "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18"
        assert len(pieces) > 10
    finally:
        running.stop()
        shutil.rmtree(repo)
