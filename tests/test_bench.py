"""The benchmark: LoRA's graph is right, the statistics find what is planted, and the command judges by them. Nothing here is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import peft
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends.onnxruntime import Bound, Decoder
from flora_export.base_model import BaseModel, load_base
from flora_export.bench import ARMS, BenchOptions, bench, share, whole_numbers
from flora_export.capture import capture
from flora_export.cli import main
from flora_export.errors import FloraExportError, FusionError
from flora_export.ledger import write_model
from flora_export.methods import load_checkpoint
from flora_export.passes import run_passes
from flora_export.passes.attach_lora import AttachLora, LoraHost, lora_hosts, lora_parameters
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.arms import EagerArm
from flora_export.verify.latency import Call, Samples, interleaved, joined, judge_overhead, summarise, to_text
from flora_export.verify.pages import gather
from tests.conftest import silent
from tests.families import make_base

RANK = 3
PACKED = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] out) {
    both = MatMul(x, gate_up)
    gate, up = Split<axis: int = -1, num_outputs: int = 2>(both)
    a = Relu(gate)
    h = Mul(a, up)
    y = MatMul(h, down)
    out = Add(x, y)
}"""


def packed_graph() -> ir.Model:
    model = ir.from_onnx_text(PACKED)
    rng = np.random.default_rng(1)
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, shape in (("gate_up", (8, 24)), ("down", (12, 8))):
        value = values[name]
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        model.graph.register_initializer(value)
    return model


HOSTS = (LoraHost("gate_up", 8, (12, 12)), LoraHost("down", 12, (8,)))


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> Any:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def numbers(model: ir.Model, name: str) -> np.ndarray[Any, Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def delta(model: ir.Model, weight: str) -> np.ndarray[Any, Any]:
    """A B, what LoRA adds to a weight: [in, out]."""
    result: np.ndarray[Any, Any] = numbers(model, f"{weight}.lora_A") @ numbers(model, f"{weight}.lora_B")
    return result


def test_lora_equals_the_merged_weights() -> None:
    model, merged = packed_graph(), packed_graph()
    run_passes(model, [AttachLora(HOSTS, RANK)])
    for host in HOSTS:
        value = merged.graph.initializers[host.weight]
        value.const_value = ir.tensor(numbers(merged, host.weight) + delta(model, host.weight), name=host.weight)
    x = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), run(merged, x), rtol=0, atol=2e-5)  # fp32, values of about 30
    assert np.abs(run(model, x) - run(packed_graph(), x)).max() > 0.01


def test_a_packed_weight_takes_two_gemms_and_an_add() -> None:
    model = packed_graph()
    run_passes(model, [AttachLora(HOSTS, RANK)])
    operators = [node.op_type for node in model.graph]
    assert [operators.count(name) for name in ("MatMul", "Add", "Split")] == [2 + 4, 1 + 2, 1]
    assert numbers(model, "gate_up.lora_A").shape == (8, 2 * RANK)
    b = numbers(model, "gate_up.lora_B")
    assert b.shape == (2 * RANK, 24)
    assert (b[:RANK, 12:] == 0).all()
    assert (b[RANK:, :12] == 0).all()
    assert (b[:RANK, :12] != 0).all()
    assert (b[RANK:, 12:] != 0).all()
    assert lora_parameters(HOSTS, RANK) == RANK * (2 * 8 + 24 + 12 + 8)


def test_a_second_run_of_lora_changes_nothing() -> None:
    model = packed_graph()
    lora = AttachLora(HOSTS, RANK)
    assert lora(model).modified
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not lora(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once
    again = packed_graph()
    lora(again)
    assert ir.to_proto(again).SerializeToString(deterministic=True) == once


def test_lora_refuses_a_shared_weight() -> None:
    model = ir.from_onnx_text(PACKED.replace("out = Add(x, y)", "z = ReduceMean(down)\n    t = Add(x, z)\n    out = Add(t, y)"))
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name in ("gate_up", "down"):
                value.const_value = ir.tensor(np.ones((8, 24) if value.name == "gate_up" else (12, 8), np.float32), name=value.name)
                model.graph.register_initializer(value)
    with pytest.raises(FusionError, match=r"down is shared by 2 nodes"):
        run_passes(model, [AttachLora(HOSTS, RANK)])


def lora_model(base: BaseModel) -> tuple[ir.Model, tuple[LoraHost, ...]]:
    model = capture(base, "cpu", "fp32").model
    hosts = lora_hosts(model, base)
    run_passes(model, [AttachLora(hosts, RANK)])
    return model, hosts


COLUMNS = {  # of the hosts of one layer: q, k, v and o; gate, up and down; packed ones in one bracket
    "llama": [(64, 32, 32), (64,), (96,), (96,), (64,)],
    "qwen3": [(64,), (32,), (32,), (64,), (96,), (96,), (64,)],
    "phi3": [(64, 32, 32), (64,), (96, 96), (64,)],
    "starcoder2": [(64, 32, 32), (64,), (96,), (64,)],
}


@pytest.mark.parametrize("family", COLUMNS)
def test_lora_equals_eager(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Logits of the graph equal those of eager PyTorch with A B added to its own weights."""
    base = load_base(str(bases(family)))
    model, hosts = lora_model(base)
    assert [host.columns for host in hosts] == COLUMNS[family] * base.layers
    eager = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation="eager")
    ids = [5, 6, 7, 8, 9]
    before = eager(torch.tensor([ids])).logits[0].detach().numpy()
    weights = eager.state_dict()
    with torch.no_grad():
        for host in hosts:
            names = host.weight.removesuffix("_t").removesuffix("__axis_0__concat").split("__")
            update = torch.from_numpy(delta(model, host.weight).T.copy())  # [out, in], as torch has it
            if names[0] not in weights:  # Phi-3 packs q, k and v itself; Starcoder 2's MLP has names of its own
                for ours, theirs in (("q_proj", "qkv_proj"), ("up_proj", "c_fc"), ("down_proj", "c_proj")):
                    names = [names[0].replace(ours, theirs)]
            for name, rows in zip(names, update.split([weights[name].shape[0] for name in names]), strict=True):
                weights[name] += rows
    expected = eager(torch.tensor([ids])).logits[0].detach().numpy()
    write_model(model, tmp_path)
    manifest = cast("Any", SimpleNamespace(padding="right", target="cpu", cache_tokens=0))
    (got,) = Decoder(Artifact(tmp_path, manifest)).start([ids])
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)  # fp32 through two layers
    assert np.abs(expected - before).max() > 1e-3


def test_lora_has_the_parameters_of_peft(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = lora_parameters(lora_model(load_base(str(base)))[1], RANK)
    assert ours == sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)


def test_another_configuration_of_heads_is_refused(base: Path) -> None:
    known = load_base(str(base))
    model = capture(known, "cpu", "fp32").model
    with pytest.raises(FusionError, match=r"has 128 columns, but the base model's configuration makes them 64 \+ 64 \+ 64"):
        lora_hosts(model, BaseModel(known.name, known.path, known.config | {"num_key_value_heads": 4}, known.weights))


def test_a_round_times_each_arm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the arms move: what an arm prepares is not timed, warm-up is not kept, a sparse arm comes every other round."""
    clock, ran, slept = [0.0], [], []
    monkeypatch.setattr("flora_export.verify.latency.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("flora_export.verify.latency.time.sleep", slept.append)

    def call(arm: str, seconds: float, **options: Any) -> Call:
        def prepare() -> float:
            clock[0] += 100
            return seconds

        def run(ready: float) -> None:
            ran.append(arm)
            clock[0] += ready

        return Call(prepare, run, **options)

    progress: list[tuple[int, int]] = []
    calls = {"base": call("base", 2), "fused": call("fused", 3), "eager": call("eager", 8, every=2, settle=0.5)}
    samples = interleaved(calls, 4, 2, lambda done, of: progress.append((done, of)))
    assert samples == {
        "base": dict.fromkeys(range(4), 2000.0),
        "fused": dict.fromkeys(range(4), 3000.0),
        "eager": dict.fromkeys((0, 2), 8000.0),
    }
    assert progress == [(i + 1, 6) for i in range(6)]
    pairs = "".join(arm[0] for arm in ran if arm != "eager")
    assert {pairs[i : i + 2] for i in range(0, 12, 2)} == {"bf", "fb"}  # not always in one order
    assert slept == [0.5] * 2
    summaries = summarise(samples)
    assert (summaries["fused"].ratio_to_base, summaries["fused"].ratio_interval) == (1.5, (1.5, 1.5))
    assert (summaries["eager"].ratio_to_base, summaries["eager"].samples) == (4.0, 2)


def drifting(ratio: float, rounds: int, seed: int) -> Samples:
    """A machine that slows down by a half on its way, with 3 % of noise on each time."""
    rng = np.random.default_rng(seed)
    base = 10 * np.linspace(1, 1.5, rounds)
    fused = base * ratio * rng.lognormal(0, 0.03, rounds)
    return {"base": dict(enumerate((base * rng.lognormal(0, 0.03, rounds)).tolist())), "fused": dict(enumerate(fused.tolist()))}


def test_a_planted_ratio_is_found() -> None:
    """In spite of a drift ten times as large; and the interval keeps its 95 %."""
    summary = summarise(drifting(1.05, 100, 0))["fused"]
    assert summary.ratio_to_base == pytest.approx(1.05, abs=0.015)
    assert summary.ratio_interval is not None
    assert summary.ratio_interval[1] - summary.ratio_interval[0] < 0.04
    assert summary.min_ms <= summary.median_ms <= summary.p90_ms
    intervals = [summarise(drifting(1.05, 60, seed))["fused"].ratio_interval or (0, 0) for seed in range(100)]
    assert 88 <= sum(low <= 1.05 <= high for low, high in intervals) <= 100


def test_an_interval_covers_how_loads_differ() -> None:
    """Each load is precise in itself, and off by 3 % from the others: no number of rounds makes that a narrow interval."""
    loads = [
        {"base": dict.fromkeys(range(40), 10.0), "fused": {i: 10 * (shift + 0.001 * (i % 3)) for i in range(40)}}
        for shift in (1.0, 1.03, 1.06)
    ]
    samples = joined(loads)
    assert list(samples["fused"]) == list(range(120))
    low, high = summarise(samples, loads=3)["fused"].ratio_interval or (0, 0)
    assert low <= 1.01
    assert high >= 1.05
    low, high = summarise(loads[1])["fused"].ratio_interval or (0, 0)
    assert 1.03 <= low <= high <= 1.032
    sparse = [{"base": {0: 10.0, 1: 20.0}, "eager": {0: 40.0}}, {"base": {0: 10.0, 1: 10.0}, "eager": {0: 50.0}}]
    assert (summarise(joined(sparse), loads=2)["eager"].ratio_to_base, joined(sparse)["eager"]) == (4.5, {0: 40.0, 2: 50.0})


def test_few_values_give_their_whole_range() -> None:
    five = {"base": dict.fromkeys(range(5), 1.0), "a": dict(enumerate([1.0, 1.4, 1.1, 1.3, 1.2]))}
    assert summarise(five)["a"].ratio_interval == (1.0, 1.4)
    assert summarise({"base": {0: 1.0}, "a": {1: 1.0}})["a"].ratio_to_base is None


def test_gathering_memory_keeps_its_bytes() -> None:
    """Whether or not the system can."""
    values = np.arange(4 << 20, dtype=np.int32)
    gather()
    assert (values == np.arange(4 << 20, dtype=np.int32)).all()


@pytest.mark.parametrize(
    ("interval", "verdict", "message"),
    [
        ((1.0, 1.02), "pass", "0.0% to 2.0% (95 % interval), within the budget of 3.0%"),
        ((0.98, 1.03), "pass", "-2.0% to 3.0%"),
        ((1.04, 1.08), "fail", "above the budget of 3.0%"),
        ((1.01, 1.04), "inconclusive", "crosses the budget of 3.0%: nothing is proved. Measure longer"),
    ],
)
def test_judge_overhead(interval: tuple[float, float], verdict: str, message: str) -> None:
    judgement = judge_overhead(interval, 0.03)
    assert judgement.verdict == verdict
    assert message in judgement.message


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def artifact(request: pytest.FixtureRequest, base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """fp32 has GroupQueryAttention, fp16 the standard Attention and position ids."""
    options = BuildOptions(precision=request.param, verify=False)
    return build(adapter, str(base), tmp_path_factory.mktemp("bench") / "out", options, silent)[0]


def test_what_is_timed_computes_the_same(artifact: Artifact) -> None:
    """Prefill, two steps and a batch, with inputs and outputs bound, as the decoder that is verified computes them."""
    decoder = Decoder(artifact)
    bound = Bound(decoder)
    prompt, tokens = np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])
    binding = bound.run(bound.bind(bound.feeds(prompt, 0), bound.empty_cache(2)))
    got = binding.get_outputs()[0].numpy()
    np.testing.assert_array_equal(got.astype(np.float32), np.stack(decoder.start(prompt.tolist())))
    for past in (3, 4):
        binding = bound.run(bound.bind(bound.feeds(tokens, past), bound.cache_after(binding)))
        got = binding.get_outputs()[0].numpy()[:, -1]
        np.testing.assert_array_equal(got.astype(np.float32), decoder.step([11, 12]))


def test_the_eager_step_is_the_same_each_time(base: Path, adapter: Path) -> None:
    known = load_base(str(base))
    threads = torch.get_num_threads()
    arm = EagerArm(known, load_checkpoint(adapter, known), "cpu", "fp32", threads + 1)
    try:
        assert torch.get_num_threads() == threads + 1
        call = arm.step(np.array([[5, 6, 7]]), np.array([[8]]))
        assert [cast("Any", call.run(call.prepare())).get_seq_length() for _ in range(2)] == [4, 4]
        whole = arm.generation(np.array([[5, 6, 7]]), np.array([[8, 9, 10]]))
        assert cast("Any", whole.run(whole.prepare())).get_seq_length() == 5  # the last new token is not fed
    finally:
        arm.close()
    assert torch.get_num_threads() == threads


SMALL = BenchOptions(prompt_tokens=(4, 6), past_tokens=(5,), new_tokens=3, batch=(1, 2), threads=1, rounds=4)


def test_every_arm(artifact: Artifact, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = BenchOptions(**{**vars(SMALL), "arms": tuple(arm for arm in ARMS if arm != "base"), "max_overhead": 0.03})
    said: list[str] = []
    result = bench(artifact.path, str(base), options, lambda what, done, of: said.append(what))
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(result)) == result
    assert result.keys() == {
        "schema_version", "what", "artifact", "arms", "settings", "measurements", "bytes_ratio_to_base", "adapter_parameters", "lora_rank",
        "budget", "environment", "command",
    }  # fmt: skip
    assert result["arms"] == list(ARMS)
    precision = artifact.manifest.precision
    padding = "right" if precision == "fp32" else "left"
    assert result["artifact"] == {"fuse": "both", "precision": precision, "target": "cpu", "rank": [4], "padding": padding}
    assert result["settings"] == {
        "prompt_tokens": [4, 6], "past_tokens": [5], "new_tokens": 3, "batch": [1, 2],
        "rounds": {"ttft": 3, "tpot": 6, "total": 3}, "threads": 1, "spinning": False,
    }  # fmt: skip
    rows = {(m["metric"], m["tokens"], m["batch"], m["arm"]): m for m in result["measurements"]}
    series = [("ttft", 4), ("ttft", 6), ("tpot", 5), ("total", 4)]
    assert list(rows) == [(*kind, batch, arm) for batch in (1, 2) for kind in series for arm in ARMS]
    for row in rows.values():
        assert row.keys() == {
            "metric", "tokens", "batch", "arm", "median_ms", "p90_ms", "min_ms", "samples", "ratio_to_base", "ratio_interval"
        }  # fmt: skip
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["samples"] == (6 if row["metric"] == "tpot" and row["arm"] != "eager" else 3)
        assert row["ratio_interval"][0] <= row["ratio_to_base"] <= row["ratio_interval"][1]
    # 2 layers of A and B for attention; A, G and B for the MLP: 2 (2 + 3) r d
    ffba = 2 * 5 * 4 * 64
    lora = 2 * ((4 * 64 + 64 + 32 + 32 + 64) + (2 * 64 + 96 + 2 * 96 + 64))  # per rank
    assert result["lora_rank"] == {"lora": 4, "lora-budget": round(ffba / lora)}
    assert result["adapter_parameters"] == {
        arm: {"base": 0, "lora": 4 * lora, "lora-budget": round(ffba / lora) * lora}.get(arm, ffba) for arm in ARMS
    }
    sizes = result["bytes_ratio_to_base"]
    assert sizes.keys() == set(ARMS) - {"eager"}
    assert sizes["base"] == 1 <= sizes["lora-budget"] < sizes["fused"] < sizes["lora"]  # the smallest tensors are not in the data file
    assert result["budget"].keys() == {"max_overhead", "metric", "tokens", "batch", "ratio", "interval", "verdict", "message"}
    assert (result["budget"]["tokens"], result["budget"]["batch"]) == (5, 1)
    assert said[0] == "building arms"
    assert "load 3 of 3: tpot, 5 tokens, batch 2" in said
    text = to_text(result)
    assert all(f"\n{arm}" in text for arm in ARMS)
    assert f"{result['budget']['verdict'].upper()}: TPOT of fused, 5 past tokens" in text


def flora(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def out(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(adapter, str(base), tmp_path_factory.mktemp("cli") / "out", BuildOptions(verify=False), silent)[0].path


@pytest.mark.parametrize(
    ("ratios", "code", "verdict"), [((1.01, 1.02), 0, "pass"), ((1.05, 1.06), 1, "fail"), ((1.0, 1.06), 1, "inconclusive")]
)
def test_exit_codes_of_the_budget(
    out: Path, base: Path, monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, float], code: int, verdict: str
) -> None:
    def planted(calls: dict[str, Call], rounds: int, warmup: int, progress: object, seed: int) -> Samples:
        return {arm: {i: 10 * (ratios[i % 2] if arm == "fused" else 1) for i in range(rounds)} for arm in calls}

    monkeypatch.setattr("flora_export.bench.interleaved", planted)
    short = ("--base", base, "--arms", "fused", "--prompt-tokens", "4", "--past-tokens", "4", "--new-tokens", "2")
    result = flora("bench", out, *short, "--max-overhead", "3%", "--json")
    assert result.exit_code == code, result.output
    assert json.loads(result.stdout)["budget"]["verdict"] == verdict
    assert json.loads(result.stdout)["arms"] == ["base", "fused"]
    assert "building arms" in result.stderr
    result = flora("bench", out, *short, "--max-overhead", "0.03")
    assert result.exit_code == code
    assert f"{verdict.upper()}: TPOT of fused" in result.stdout
    assert flora("bench", out, *short).exit_code == 0  # no budget, no verdict


BAD: list[tuple[list[str], str]] = [
    (["--arms", "base,nonsense"], "--arms: 'nonsense' is unknown; there are eager, base"),
    (["--arms", "base,lora", "--max-overhead", "3%"], "judges the arm fused"),
    (["--max-overhead", "3"], "must be at least 0 and below 1"),
    (["--max-overhead", "much"], "expected a share"),
    (["--prompt-tokens", "4,x"], "expected whole numbers"),
    (["--batch", "0"], "must be at least 1"),
    (["--past-tokens", "128"], "129 tokens are asked for, but the base model's context has 128"),
    (["--base", "/no/where"], "no such directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[case[1] for case in BAD])
def test_wrong_use_is_refused(out: Path, base: Path, arguments: list[str], message: str) -> None:
    result = flora("bench", out, "--base", base, "--prompt-tokens", "4", "--past-tokens", "4", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""


def test_another_base_is_refused(out: Path, tmp_path: Path) -> None:
    other = make_base("llama", tmp_path / "other", seed=7)
    result = flora("bench", out, "--base", other, "--prompt-tokens", "4", "--past-tokens", "4")
    assert result.exit_code == 2
    assert "is not the base model that" in result.stderr
    assert open_artifact(out).manifest.base["name"]


def test_numbers_of_options() -> None:
    assert whole_numbers("32,128,32", "--batch") == (32, 128)
    assert (share("3%", "x"), share("0.03", "x"), share("0%", "x")) == (0.03, 0.03, 0.0)
    with pytest.raises(FloraExportError):
        share("nan", "x")
