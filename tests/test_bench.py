"""The benchmark: LoRA has its size, the statistics find what is planted, and the command judges by them. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends.onnxruntime import Bound, Decoder
from flora_export.base_model import load_base
from flora_export.bench import ARMS, BenchOptions, bench, share, whole_numbers
from flora_export.cli import main
from flora_export.errors import FloraExportError
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.arms import EagerArm
from flora_export.verify.build_arms import lora_parameters, random_lora
from flora_export.verify.latency import Call, Samples, interleaved, joined, judge_overhead, summarise, to_text
from flora_export.verify.pages import gather
from tests.conftest import silent
from tests.families import make_base


def test_lora_has_the_parameters_of_peft(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    known = load_base(str(base))
    trainable = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert lora_parameters(known, 3) == trainable
    checkpoint = random_lora(known, 3, tmp_path / "lora")
    assert sum(checkpoint.tensor(name).size for name in checkpoint.tensors) == trainable and not checkpoint.changes


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
    ranks = {"lora": 4, "lora-budget": round(ffba / lora), "lora-forward": 4, "lora-merged": 4}
    assert result["lora_rank"] == ranks
    assert result["adapter_parameters"] == {arm: 0 if arm == "base" else ranks[arm] * lora if arm in ranks else ffba for arm in ARMS}
    sizes = result["bytes_ratio_to_base"]
    assert sizes.keys() == set(ARMS) - {"eager"}
    assert (
        sizes["base"] == sizes["lora-merged"] == 1 <= sizes["lora-budget"] < sizes["fused"] < sizes["lora"]
    )  # the smallest tensors are not in the data file
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
