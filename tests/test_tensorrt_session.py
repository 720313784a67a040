"""The engine's session: buffers, shapes, profiles and the way of the KV cache, with a stand-in for TensorRT.

The stand-in takes TensorRT's own calls, reads and writes raw memory at the addresses that it is given, as an engine does, and computes with
ONNX Runtime. What it cannot show is left to a machine with a GPU: CUDA streams, the CUDA graph, and the engine's own numbers.
"""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from flora_export.artifact import Artifact
from flora_export.backends import load_backend
from flora_export.backends.tensorrt import session
from flora_export.backends.tensorrt.flavour import Flavour
from flora_export.backends.tensorrt.plan import EngineOptions, engine_plan, parse_ranges
from flora_export.backends.tensorrt.portable import PortableDecoder
from flora_export.backends.tensorrt.stacks import opened
from flora_export.bank import LAYOUTS, STACK
from flora_export.errors import BackendError
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.verify.coverage import run_forced
from flora_export.verify.golden import replay
from tests.banks import make_bank
from tests.conftest import silent

pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install 'flora-export[tensorrt-rtx]'", exc_type=ImportError)

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
FORCED = [[20, 21, 22], [23, 24, 25], [26, 27, 28]]
TYPES = {"tensor(int64)": ("INT64", np.int64), "tensor(float16)": ("HALF", np.float16)}


class StandIn:
    """An engine: `model.onnx` in ONNX Runtime, behind TensorRT's calls."""

    def __init__(self, artifact: Artifact) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        with opened(artifact.path, artifact.manifest) as (graph, inputs):
            self.session = ort.InferenceSession(graph, options)
            self.inputs = {tensor.name: tensor for tensor in inputs}
        self.values = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.values)
        self.profiles = engine_plan(artifact).profiles
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=TYPES[self.values[name].type][0])

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace()

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts += 1
        return Context(self)


class Context:
    def __init__(self, engine: StandIn) -> None:
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, -1
        self.shapes: dict[str, tuple[int, ...]]
        self.addresses: dict[str, int]

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        profile, tensor = self.engine.profiles[self.profile], self.engine.inputs[name]
        return all(low <= size <= high for low, size, high in zip(profile.shape(tensor, 0), shape, profile.shape(tensor, 2), strict=True))

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        values = self.engine.values
        inputs = [value.name for value in self.engine.session.get_inputs()]
        feeds = {name: self._memory(name, self.shapes[name]).copy() for name in inputs}
        outputs = [name for name in values if name not in inputs]
        for name, result in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            self._memory(name, result.shape)[...] = result
        return True

    def _memory(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(TYPES[self.engine.values[name].type][1])
        count = int(np.prod(shape))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype, count).reshape(shape)


@pytest.fixture(scope="module", params=[0, 60], ids=["growing", "static"])
def artifact(request: pytest.FixtureRequest, base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    engine = EngineOptions(
        "rtx", ("8.9",), parse_ranges(["prompt=1:16:40 past=1:30:55"]), compare_base=False, cache=False, cache_tokens=request.param
    )
    options = BuildOptions("tensorrt", precision="fp16", settings=engine)
    return build(adapter, str(base), tmp_path_factory.mktemp("session") / "out", options, silent)[0]


@pytest.fixture
def decoder(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> session.EngineDecoder:
    return stand_in(artifact, monkeypatch)


def stand_in(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> session.EngineDecoder:
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda content: StandIn(artifact))
    strategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
    trt = types.SimpleNamespace(ILogger=object, Runtime=lambda logger: runtime, CudaGraphStrategy=strategy)
    version = artifact.manifest.engine["version"]
    monkeypatch.setattr(session, "load_flavour", lambda name: Flavour("rtx", version, trt))
    monkeypatch.setattr(session, "logged", lambda flavour: _nothing())
    monkeypatch.setattr(session, "machine_capability", lambda: "8.9")
    return session.EngineDecoder(artifact, device="cpu")


class _nothing:
    def __enter__(self) -> tuple[None, Any]:
        return None, types.SimpleNamespace(errors=[])

    def __exit__(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]], ids=["one", "short", "ragged"])
def test_prefill_and_steps(decoder: session.EngineDecoder, artifact: Artifact, rows: list[int]) -> None:
    prompts, forced = [PROMPTS[row] for row in rows], [FORCED[row] for row in rows]
    expected = run_forced(PortableDecoder(artifact), prompts, forced)
    for _ in range(2):  # a second prompt finds no trace of the first
        for row, got in zip(expected, run_forced(decoder, prompts, forced), strict=True):
            np.testing.assert_allclose(got, row, rtol=0, atol=5e-3)  # fp16
    bare = run_forced(PortableDecoder(artifact, adapter=False), prompts, forced)
    assert np.abs(bare[0] - expected[0]).max() > 0.05


def test_resume(decoder: session.EngineDecoder, artifact: Artifact) -> None:
    rng = np.random.default_rng(0)
    cache = [tuple(rng.standard_normal((1, 2, 40, 16), np.float32) for _ in range(2)) for _ in range(2)]
    assert decoder.cache_shapes() == [(2, 16), (2, 16)]
    results = []
    for runner in (decoder, PortableDecoder(artifact)):
        runner.resume(cache)
        results.append([runner.step([token]) for token in (5, 6)])
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=5e-3)


def test_golden_vectors_replay(decoder: session.EngineDecoder, artifact: Artifact) -> None:
    assert replay(artifact, decoder) == []


def test_other_batch_sizes_between(decoder: session.EngineDecoder, artifact: Artifact) -> None:
    """What is kept of a static decode step belongs to one batch size."""
    (expected,) = run_forced(PortableDecoder(artifact), PROMPTS[:1], FORCED[:1])
    for rows in (1, 3, 1, 1):
        got = run_forced(decoder, PROMPTS[:rows], FORCED[:rows])
        np.testing.assert_allclose(got[0], expected, rtol=0, atol=5e-3)
    assert decoder.engine.contexts == (4 if artifact.manifest.cache_tokens else 2)  # a new one each time that the batch changes


def test_verification_keeps_to_what_the_engine_takes(
    decoder: session.EngineDecoder, artifact: Artifact, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU: long prompts, a ragged batch and the near end of the context, within the profiles."""
    backend = load_backend("tensorrt")
    portable = backend.decode
    monkeypatch.setattr(backend, "decode", lambda a, *, adapter=True, exact=False: decoder if adapter else portable(a, adapter=adapter))
    report = verify(artifact.path, adapter, str(base), VerifyOptions(), silent)
    assert report.verified, report.to_text()
    assert report.environment["runtime"].startswith("TensorRT-RTX")
    assert "; without its adapter in ONNX Runtime" in report.environment["runtime"]
    assert report.numerics is not None
    assert max(case.past[1] for case in report.numerics.cases) == decoder.limits.total - 2


def test_beyond_what_the_engine_takes(decoder: session.EngineDecoder) -> None:
    with pytest.raises(BackendError, match=r"1 rows of 41 tokens: the engine was built for up to 8 rows, prompts of 40 tokens"):
        decoder.start([[5] * 41])
    with pytest.raises(BackendError, match="9 rows of 2 tokens"):
        decoder.start([[5, 6]] * 9)
    decoder.start([[5] * 40])
    for _ in range(decoder.limits.total - 40):
        decoder.step([5])
    with pytest.raises(BackendError, match=f"1 rows of {decoder.limits.total + 1} tokens"):
        decoder.step([5])


@pytest.mark.parametrize("cache_tokens", [0, 60], ids=["growing", "static"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bank(
    layout: str, cache_tokens: int, adapters: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a batch with their own adapters; in a stack an adapter is replaced in the engine's memory, and comes back."""
    ranges = parse_ranges(["prompt=1:16:40 past=1:30:55"])
    engine = EngineOptions("rtx", ("8.9",), ranges, compare_base=False, cache=False, cache_tokens=cache_tokens)
    two = {name: adapters[name] for name in ("first", "second")}
    out = make_bank(two, base, tmp_path / "out", layout, backend="tensorrt", precision="fp16", settings=engine)
    decoder, portable = stand_in(out, monkeypatch), PortableDecoder(out)

    def both(slots: list[int]) -> list[list[Any]]:
        for runner in (decoder, portable):
            runner.choice.choose(slots)
        return [run_forced(runner, PROMPTS, FORCED) for runner in (decoder, portable)]

    seen = {}
    for slots in ([0, 1, -1], [1, -1, 0], [0, 0, 0]):
        got, expected = both(slots)
        for row, (one, other) in enumerate(zip(got, expected, strict=True)):
            np.testing.assert_allclose(one, other, rtol=0, atol=5e-3)
            seen[slots[row], row] = one
    assert np.abs(seen[0, 0] - seen[1, 0]).max() > 0.05 and np.abs(seen[-1, 1] - seen[1, 1]).max() > 0.05
    if layout == STACK:
        decoder.set_adapter(1, adapters["third"])
        decoder.choice.choose([1, 1, 0])
        swapped = run_forced(decoder, PROMPTS, FORCED)
        assert np.abs(swapped[0] - seen[1, 0]).max() > 0.05
        np.testing.assert_allclose(swapped[2], seen[0, 2], rtol=0, atol=5e-3)
        decoder.set_adapter(1, adapters["second"])
        decoder.choice.choose([1, -1, 0])
        np.testing.assert_array_equal(run_forced(decoder, PROMPTS, FORCED)[0], seen[1, 0])
