"""A real tritonserver on a bank, over HTTP and gRPC: whatever is asked at once, each answer is its own adapter's."""

from __future__ import annotations

import itertools
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.triton.config import Serving
from flora_export.bank import BASE, LAYOUTS
from flora_export.publish import publish
from tests.conftest import silent
from tests.test_bank_serving import NAMES, QUESTION, WHO, greedy, make_bank
from tests.test_triton_server import SERVER, TOLERANCE, Server, grpc, post, stream, tensors, tritonhttp

IDS = (0, 1, 2, BASE)
STEPS = 16
THERE_ARE = "there are first, second, third, base"


@dataclass(frozen=True)
class Served:
    """A running server, what it serves, and where from."""

    server: Server
    bank: Artifact
    repo: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp(request.param)
    bank = make_bank(root, request.param)
    publish(bank, root / "repo", Serving(concurrent=8, threads=1), silent)
    running = Server(SERVER, root / "repo", log=root / "server.log")
    try:
        running.wait()
        yield Served(running, bank, root / "repo")
    finally:
        running.stop()


# decoder


def feeds(bank: Artifact, rows: np.ndarray, ids: Any) -> dict[str, Any]:
    """A prefill of rows of one length, each with its adapter's id."""
    cache = {
        tensor.name: np.zeros((len(rows), tensor.shape[1], 0, tensor.shape[3]), np.float32)  # type: ignore[arg-type]
        for tensor in bank.manifest.inputs
        if tensor.name.startswith("past_key_values.")
    }
    return {"input_ids": rows, "attention_mask": np.ones_like(rows), "adapter_ids": np.asarray(ids, np.int64), **cache}


def alone(own: Decoder, slot: int, row: np.ndarray) -> np.ndarray:
    own.choice.choose(slot)
    return own.start([row.tolist()])[0]


def test_decoder_gives_each_row_its_own_adapter(served: Served) -> None:
    """One prompt to all adapters and the base model as one batch, prefill and a cached step."""
    own, row = Decoder(served.bank), np.array([5, 6, 7, 8, 9], np.int64)
    for order in (IDS, IDS[::-1]):
        prefill = [alone(own, slot, row) for slot in order]
        step = []
        for slot in order:
            alone(own, slot, row)
            step.append(own.step([30])[0])
        for wanted in (prefill, step):
            assert min(np.abs(a - b).max() for a, b in itertools.combinations(wanted, 2)) > 100 * TOLERANCE
        given = feeds(served.bank, np.stack([row] * 4), [[slot] for slot in order])
        for module, address in ((grpc, served.server.grpc), (tritonhttp, served.server.http)):
            client = module.InferenceServerClient(address)
            result = client.infer("decoder", tensors(module, given))
            np.testing.assert_allclose(result.as_numpy("logits"), np.stack(prefill), rtol=0, atol=TOLERANCE)
            kept = {name: result.as_numpy(name.replace("past_key_values.", "present.")) for name in given if "past" in name}
            more = {"input_ids": np.full((4, 1), 30, np.int64), "attention_mask": np.ones((4, 6), np.int64)}
            result = client.infer("decoder", tensors(module, given | more | kept))
            np.testing.assert_allclose(result.as_numpy("logits")[:, -1], np.stack(step), rtol=0, atol=TOLERANCE)
            client.close()


def runs(server: Server) -> tuple[float, float]:
    """Requests that `decoder` has answered, and how often it ran for them."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    asked, ran = (
        sum(map(float, re.findall(rf'^nv_inference_{name}\{{model="decoder"[^}}]*\}} (\S+)$', text, re.M)))
        for name in ("count", "exec_count")
    )
    return asked, ran


def test_decoder_joins_requests_of_different_adapters(served: Served) -> None:
    own, client = Decoder(served.bank), grpc.InferenceServerClient(served.server.grpc)
    prompts = np.random.default_rng(0).integers(5, 250, size=(16, 1, 6))
    asked = [(slot, row) for row in prompts for slot in IDS]

    def run(pair: tuple[int, np.ndarray]) -> np.ndarray:
        logits: np.ndarray = client.infer("decoder", tensors(grpc, feeds(served.bank, pair[1], [[pair[0]]]))).as_numpy("logits")
        return logits[0]

    before = runs(served.server)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, asked))
    counted, ran = (now - then for now, then in zip(runs(served.server), before, strict=True))
    assert counted == len(asked)
    assert ran < counted  # some were joined
    for (slot, row), answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer, alone(own, slot, row[0]), rtol=0, atol=TOLERANCE)
    client.close()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0], [3]], "out of data bounds"),
        ([[0], [99]], "out of data bounds"),
        ([[-2], [0]], "out of data bounds"),
        ([0, 1], "unexpected shape for input 'adapter_ids'"),
        ([[0, 1], [0, 1]], "unexpected shape for input 'adapter_ids'"),
        ([[0]], "batch size does not match"),
        (None, "expected"),
    ],
)
def test_decoder_refuses_wrong_ids(served: Served, ids: Any, message: str) -> None:
    """Out of range, of another shape, of another number than rows, or none."""
    rows = np.array([[5, 6, 7], [5, 6, 7]], np.int64)
    given = feeds(served.bank, rows, [[0], [1]])
    wrong = {name: array for name, array in given.items() if name != "adapter_ids"} | (
        {} if ids is None else {"adapter_ids": np.asarray(ids, np.int64)}
    )
    for module, address in ((grpc, served.server.grpc), (tritonhttp, served.server.http)):
        client = module.InferenceServerClient(address)
        with pytest.raises(module.InferenceServerException, match=message):
            client.infer("decoder", tensors(module, wrong))
        assert client.infer("decoder", tensors(module, given)).as_numpy("logits").shape[:2] == (2, 3)
        client.close()


# generate


def test_two_hundred_requests_of_all_adapters_at_once(served: Served) -> None:
    """Every question goes to all three adapters and the base model, streamed and whole."""
    questions = [QUESTION, "you say what?", "ask", "the answer is 4", "what is the question, you ask?"]
    wanted = {(who, question): greedy(served.bank, who, question, STEPS) for who in WHO for question in questions}
    assert all(len({wanted[who, question] for who in WHO}) == len(WHO) for question in questions)
    asked = list(itertools.product(WHO, questions)) * 10

    def run(index: int) -> str:
        (who, question), streamed = asked[index], index % 3 == 0
        content = {"text_input": question, "max_tokens": STEPS, "stream": streamed, "adapter": who}
        status, answer = post(served.server, content, "generate_stream" if streamed else "generate")
        assert status == 200, answer
        return "".join(piece["text_output"] for piece in (answer if streamed else [answer]))

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(run, range(len(asked))))
    assert len(answers) == 200
    assert answers == [wanted[pair] for pair in asked]


def test_generate_takes_an_adapter_over_grpc(served: Served) -> None:
    for who in WHO:
        wanted = greedy(served.bank, who, QUESTION, STEPS)
        length = {"max_tokens": np.array([STEPS], np.int32)}
        for given, parameters in (({"adapter": who}, None), ({}, {"adapter": who})):
            results, error = stream(served.server, {"text_input": QUESTION, **length, **given}, parameters)
            assert error is None
            assert [result.as_numpy("text_output")[0].decode() for result in results] == [wanted]
    for given, parameters, message in (
        ({}, None, f"adapter is missing; {THERE_ARE}"),
        ({}, {"adapter": "fourth"}, f"there is no adapter 'fourth'; {THERE_ARE}"),
        ({}, {"adapter": 1}, "adapter is 1, but must be a name"),
        ({"adapter": np.array([0], np.int32)}, None, "data-type"),
        ({"adapter": np.array([b"\xff"], np.object_)}, None, "adapter is not UTF-8"),
        ({"adapter": np.array([b"first", b"second"], np.object_)}, None, "unexpected shape for input 'adapter'"),
    ):
        pieces, error = stream(served.server, {"text_input": QUESTION, **given}, parameters)
        assert (len(pieces), message in str(error)) == (0, True), error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, f"adapter is missing; {THERE_ARE}"),
        ({"adapter": "fourth"}, f"there is no adapter 'fourth'; {THERE_ARE}"),
        ({"adapter": ""}, f"there is no adapter ''; {THERE_ARE}"),
        ({"parameters": {"adapter": "fourth"}}, f"there is no adapter 'fourth'; {THERE_ARE}"),
        ({"adapter": ["first", "second"]}, "adapter"),
        ({"adapters": "first"}, "unknown parameter adapters"),
    ],
)
def test_generate_does_not_guess(served: Served, given: dict[str, Any], message: str) -> None:
    status, answer = post(served.server, {"text_input": QUESTION, "max_tokens": 2, **given})
    assert (status, message in answer["error"]) == (400, True), answer
    assert post(served.server, {"text_input": QUESTION, "max_tokens": 2, "adapter": "base"})[0] == 200


@pytest.mark.parametrize(
    ("model", "name", "content"),
    [
        pytest.param("decoder", "adapter_ids", len(NAMES).to_bytes(8, "little"), id="decoder"),
        pytest.param("generate", "adapter", b"\x06\0\0\0fourth", id="generate"),
    ],
)
def test_the_warm_up_asks_for_an_adapter(served: Served, tmp_path: Path, model: str, name: str, content: bytes) -> None:
    """With one that there is not, the server does not become ready: what is published has done its warm-up."""
    repo = Path(shutil.copytree(served.repo, tmp_path / "repo"))
    (repo / model / "warmup" / f"1.{name}").write_bytes(content)
    wrong = Server(SERVER, repo, log=tmp_path / "log", poll=None)
    with pytest.raises(RuntimeError, match="did not become ready"):
        wrong.wait()
    assert f"successfully loaded '{model}'" not in (tmp_path / "log").read_text(errors="replace")
