"""The `generate` model of a Triton repository: text in, text out, streamed or whole. In a version, the package `program` is beside it."""

from __future__ import annotations

import hashlib
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # the server brings it
from program.generation import Job, Model, Piece, RequestError, Settings, read_messages
from program.scheduler import Scheduler

SCALARS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream", "chat")  # inputs of one number each
LONGEST_MESSAGE = 2000  # characters of an error


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the version's files against its manifest, and load it. An error keeps the version from going live."""
        version = Path(args["model_repository"]) / args["model_version"]
        given = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        if given["check_files"] == "true":
            faults = _changed_files(version)
            if faults:
                raise pb_utils.TritonModelException(f"{version} is damaged: {'; '.join(faults)}. Publish the artifact again.")
        self.model = Model(version, int(given["threads"]), int(given["max_prompt"]))
        self.scheduler = Scheduler(self.model.decoder, int(given["concurrent_requests"]))
        self.most_tokens = int(given["max_tokens"])
        self.counters = Counters({"model": args["model_name"], "version": args["model_version"]})

    def execute(self, requests: list[Any]) -> None:
        """Take requests over. It waits while all slots are taken: the rest waits in the server's own queue, which counts and limits it."""
        for request in requests:
            try:
                self._take(request)
            except Exception:  # one request's failure must not be that of those which came with it
                traceback.print_exc()

    def _take(self, request: Any) -> None:
        answer = Answer(request, self.counters)
        try:
            settings, prompt = self._read(request)
        except RequestError as error:
            answer.fail(str(error), "invalid")
        except Exception as error:
            traceback.print_exc()
            answer.fail(f"the prompt could not be read ({type(error).__name__}: {error})", "internal")
        else:
            self.scheduler.submit(Job(self.model, prompt, settings, answer.send, answer.fail, answer.sender.is_cancelled))

    def finalize(self) -> None:
        """The server has answered all requests of this version, and unloads it."""
        self.scheduler.stop()

    def _read(self, request: Any) -> tuple[Settings, list[int]]:
        """Raises RequestError."""
        inputs = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        given = json.loads(request.parameters() or "{}")
        given.pop("triton_enable_empty_final_response", None)  # the server's own
        for name in SCALARS:
            if name in inputs:
                given[name] = _one(inputs, name).item()
        if "adapter" in inputs:
            given["adapter"] = _text(_one(inputs, "adapter"), "adapter")
        if "stop" in inputs:
            given["stop"] = [_text(value, "stop") for value in inputs["stop"]]
        if ("text_input" in inputs) == ("messages" in inputs):
            raise RequestError("give text_input or messages, one of the two")
        settings = Settings.read(given, self.most_tokens)
        self.model.check_adapter(settings)
        if "messages" in inputs:
            messages = read_messages(_text(_one(inputs, "messages"), "messages"), self.model.most_characters)
            return settings, self.model.encode(None, messages, settings)
        return settings, self.model.encode(_text(_one(inputs, "text_input"), "text_input"), None, settings)


class Counters:
    """Metrics of the server: how requests end, and their tokens. Triton's own count a streaming request when it is handed over."""

    def __init__(self, labels: dict[str, str]) -> None:
        counter = pb_utils.MetricFamily.COUNTER
        self._requests = pb_utils.MetricFamily("flora_generate_requests", "Answers by how they ended", counter)
        self._tokens = pb_utils.MetricFamily("flora_generate_tokens", "Tokens of the answers that came to their end", counter)
        ends = ("stop", "length", "cancelled", "invalid", "internal")
        self._by_end = {end: self._requests.Metric(labels={**labels, "end": end}) for end in ends}
        self._by_kind = {kind: self._tokens.Metric(labels={**labels, "kind": kind}) for kind in ("prompt", "new")}

    def count(self, end: str, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """One request more has ended so."""
        self._by_end[end].increment(1)
        if prompt_tokens:
            self._by_kind["prompt"].increment(prompt_tokens)
            self._by_kind["new"].increment(new_tokens)


class Answer:
    """Where the pieces of one request go."""

    def __init__(self, request: Any, counters: Counters) -> None:
        self.sender, self.counters = request.get_response_sender(), counters

    def send(self, piece: Piece) -> None:
        """Send a piece; the last one ends the request."""
        outputs = [_strings("text_output", piece.text)]
        if piece.reason:
            outputs += [_strings("finish_reason", piece.reason)]
            outputs += [_number("prompt_tokens", piece.prompt_tokens), _number("new_tokens", piece.new_tokens)]
        self.sender.send(pb_utils.InferenceResponse(outputs), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if piece.reason else 0)
        if piece.reason:  # and not before: a piece that cannot be sent fails, and is counted as that
            self.counters.count(piece.reason, piece.prompt_tokens, piece.new_tokens)

    def fail(self, message: str, kind: str) -> None:
        """End the request with an error: "invalid", "cancelled" or "internal"."""
        sendable = message.encode("utf-8", "replace").decode()[:LONGEST_MESSAGE]  # it may quote what the client sent
        code = {"invalid": pb_utils.TritonError.INVALID_ARG, "cancelled": pb_utils.TritonError.CANCELLED}
        error = pb_utils.InferenceResponse(error=pb_utils.TritonError(sendable, code.get(kind, pb_utils.TritonError.INTERNAL)))
        self.counters.count(kind)
        self.sender.send(error, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _changed_files(version: Path) -> list[str]:
    """Files of a version that are not those of its manifest, a line each."""
    files: dict[str, dict[str, Any]] = json.loads((version / "manifest.json").read_text(encoding="utf-8"))["files"]
    faults = []
    for name, known in files.items():
        if not (version / name).is_file():
            faults.append(f"{name} is missing")
            continue
        with (version / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
                faults.append(f"{name} is not the file that was published: its SHA-256 differs from the manifest's")
    return faults


def _one(inputs: dict[str, Any], name: str) -> Any:
    if inputs[name].size != 1:
        raise RequestError(f"{name} has {inputs[name].size} values, but must have one")
    return inputs[name][0]


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error})") from error


def _strings(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))


def _number(name: str, value: int) -> Any:
    return pb_utils.Tensor(name, np.array([value], np.int32))
