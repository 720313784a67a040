"""benchmarks/gpu.py on the CPU with a tiny shape: the fused arm is exact, and every arm is measured or says why not."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flora_export.ffba import FFBAConfig
from tests.families import LAYERS, SHAPE, VOCABULARY

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package

import fused_torch  # noqa: E402  # found on the path above
import gpu  # noqa: E402
import gpu_arms  # noqa: E402

TINY = ["--tiny", "--device", "cpu", "--dtypes", "fp32", "--rank", "4", "--past", "4,7", "--prompt", "5", "--batch", "2", "--rounds", "2"]
CELLS = [("decode", 4, 2), ("decode", 7, 2), ("prefill", 5, 2)]


def make_pair(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[nn.Module, nn.Module]:
    """(base, unfused): a random Llama with biases and a random adapter for it, B and scale included."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tf.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)).to(dtype).eval()
    for parameter in base.model.layers.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.shape == (SHAPE["hidden_size"],) else 0.0, std=0.15)
    adapter = FFBAConfig(**({"r": 4, "alpha": 6.0, "init_ffba_weights": False} | config))
    return base, peft.get_peft_model(fused_torch.share_copy(base), adapter, autocast_adapter_dtype=False).get_base_model().eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a prefill and three cached steps: [2, 11, vocabulary]."""
    ids = torch.arange(22).reshape(2, 11) * 7 % VOCABULARY
    output = model(input_ids=ids[:, :8], use_cache=True)
    parts = [output.logits]
    for position in range(8, 11):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attn_activation": "relu", "mlp_activation": "identity"},
        {"attn_activation": "silu", "mlp_activation": "relu"},
        {"attn_activation": "gelu", "mlp_activation": "silu", "use_rslora": True},
        {"rank_pattern": {r"layers\.1\.mlp": 7, r"layers\.0\.self_attn": 1}},
        {"target_modules": ["mlp"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_fused_is_unfused(config: dict[str, Any]) -> None:
    base, unfused = make_pair(**config)
    expected = logits(unfused)
    found = logits(fused_torch.fuse(unfused))
    effect = (expected - logits(base)).norm()
    assert effect > 0.02 * expected.norm()  # the adapter says something
    assert (found - expected).norm() < 1e-5 * effect  # fp32: sums in another order


def test_fuse_leaves_its_argument_and_shares_what_it_does_not_widen() -> None:
    _, unfused = make_pair()
    before = logits(unfused)
    fused = fused_torch.fuse(unfused)
    assert torch.equal(logits(unfused), before)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in fused.modules())
    first, again = fused.model.layers[0], unfused.model.layers[0]
    assert first.self_attn.q_proj.weight is again.self_attn.base_layer.q_proj.weight
    assert first.self_attn.v_proj.linear.weight.shape == (32 + 4, 64)
    assert first.self_attn.o_proj.linear.weight.shape == (64, 64 + 4)
    assert first.mlp.gate_proj.weight.shape == first.mlp.up_proj.weight.shape == (96 + 4, 64)
    assert first.mlp.down_proj.weight.shape == (64, 96 + 4)
    assert gpu_arms.weight_bytes(fused) == gpu_arms.weight_bytes(unfused) + 4 * 4 * LAYERS * 3  # zeros under three biases, fp32


def test_scale_is_folded_in_fp32() -> None:
    _, unfused = make_pair(torch.bfloat16, r=3, alpha=1.0, gated_gain=1.0)
    b = unfused.model.layers[0].mlp.ffba_B["default"].weight
    assert b.dtype == torch.bfloat16
    found = fused_torch.fuse(unfused).model.layers[0].mlp.down_proj.weight[:, 96:]
    assert torch.equal(found, (b.float() / 3).bfloat16())


def test_two_active_adapters_are_refused() -> None:
    base, _ = make_pair()
    model = peft.get_peft_model(base, FFBAConfig(r=2))
    model.add_adapter("other", FFBAConfig(r=2))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: 2 active adapters"):
        fused_torch.fuse(model.get_base_model())


@pytest.mark.parametrize("arm", fused_torch.ARMS)
def test_an_arm_is_one_graph_with_nothing_left_over(arm: str) -> None:
    """CUDA graphs want the whole step in one graph, and no output but the logits."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        base = gpu_arms.make_base("tiny", torch.float32, "cpu")
        model = fused_torch.make_arm(arm, base, 4)
        cell = gpu_arms.Cell("tiny", "fp32", "decode", 6, 2)
        plain = gpu_arms.torch_steps({arm: model}, cell, base.config, "cpu")[arm]
        compiled = gpu_arms.torch_steps({arm: torch.compile(model, backend=backend, fullgraph=True)}, cell, base.config, "cpu")[arm]
        for step in (plain, compiled, compiled):
            step.prepare()
        torch.testing.assert_close(compiled.call(), plain.call(), rtol=1e-5, atol=1e-6)
    (graph,) = graphs
    (outputs,) = graph.graph.output_node().args
    assert len(outputs) == 1


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run inside this process writes; without the arms of ONNX Runtime, which take most of the time."""
    monkeypatch.setattr(gpu_arms, "why_no_onnxruntime", lambda device: "not in this test")
    return tmp_path / "gpu.json"


def run(output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = gpu.main([*TINY, "--no-compile", "--output", str(output), *arguments])
    return code, json.loads(output.read_text())


def measured(result: dict[str, Any], mode: str = "eager") -> set[tuple[Any, ...]]:
    return {(m["arm"], m["metric"], m["tokens"], m["batch"]) for m in result["measurements"] if m["mode"] == mode}


def test_every_arm_is_measured_or_says_why_not(tmp_path: Path) -> None:
    """As people call it. ONNX Runtime's CPU provider stands in for CUDA's."""
    file = tmp_path / "results" / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *TINY, "--no-compile", "--output", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["complete"] and "gpu.py --tiny" in result["command"] and result["settings"]["rank"] == 4
    assert {"cpu", "gpu", "versions"} <= result["environment"].keys()
    assert all(check["passed"] for check in result["parity"])
    assert len(result["parity"]) == 1 + len(CELLS) + 1
    every = {(arm, *cell) for arm, cell in product(fused_torch.ARMS, CELLS)}
    assert measured(result) == every
    assert measured(result, "onnxruntime") == {key for key in every if key[0] != "lora"}
    for entry in result["measurements"]:
        low, high = entry["ratio_interval"]
        assert entry["samples"] == 2 and 0 < entry["median_ms"] <= entry["p90_ms"] and 0 < low <= entry["ratio_to_base"] <= high
        assert entry["arm"] != "base" or entry["ratio_to_base"] == 1
    assert [(entry["arm"], entry["mode"], entry["reason"]) for entry in result["not_measured"]] == [("all", "compiled", "--no-compile")]


def test_a_broken_arm_does_not_end_the_run(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_arm(arm: str, base: nn.Module, rank: int) -> nn.Module:
        model = fused_torch.make_arm(arm, base, rank)
        if arm == "lora":
            raise RuntimeError("no LoRA today")
        if arm == "unfused":
            model.model.layers[1].forward = lambda *_, **__: 1 / 0
        return model

    monkeypatch.setattr(gpu, "make_arm", make_arm)
    code, result = run(output)
    assert code == 0 and result["complete"]
    assert measured(result) == {(arm, *cell) for arm, cell in product(("base", "fused"), CELLS)}
    errors = {(entry["arm"], entry["error"]) for entry in result["not_measured"] if "error" in entry}
    assert errors == {("lora", "RuntimeError: no LoRA today"), ("unfused", "ZeroDivisionError: division by zero")}


def test_an_arm_that_fails_while_it_is_timed_leaves_the_others(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def make_arm(arm: str, base: nn.Module, rank: int) -> nn.Module:
        model = fused_torch.share_copy(fused_torch.make_arm(arm, base, rank))  # others are copies of base
        if arm != "base":
            return model
        forward = model.forward

        def fails_late(**inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > gpu.WARM_UP + 1:  # in the second round of the first cell
                raise RuntimeError("out of memory")
            return forward(**inputs)

        model.forward = fails_late
        return model

    monkeypatch.setattr(gpu, "make_arm", make_arm)
    _, result = run(output)
    assert measured(result) == {(arm, *cell) for arm, cell in product(("fused", "lora", "unfused"), CELLS)}
    assert all(m["samples"] == 2 and m["ratio_to_base"] is None for m in result["measurements"])
    assert [(e["arm"], e["error"]) for e in result["not_measured"] if "error" in e] == [("base", "RuntimeError: out of memory")] * len(
        CELLS
    )


def test_a_wrong_fused_arm_is_exit_code_1(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "make_arm", lambda arm, base, rank: fused_torch.make_arm("base" if arm == "fused" else arm, base, rank))
    code, result = run(output)
    assert code == 1 and result["complete"]
    wrong = [check for check in result["parity"] if not check["passed"]]
    assert len(wrong) == len(CELLS) and all(check["error_over_effect"] == pytest.approx(1, abs=1e-3) for check in wrong)


def test_a_parity_check_that_breaks_is_exit_code_1(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_arms, "fuse", lambda model: 1 / 0)
    code, result = run(output, "--past", "4")
    assert code == 1 and ("base", *CELLS[0]) in measured(result)
    assert result["parity"][0]["error"] == "ZeroDivisionError: division by zero"


def test_a_killed_run_leaves_what_it_had(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(report: gpu.Report, cell: gpu_arms.Cell, *rest: Any) -> None:
        if cell.tokens == 7:
            raise KeyboardInterrupt
        original(report, cell, *rest)

    original = gpu.measure
    monkeypatch.setattr(gpu, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(output)
    result = json.loads(output.read_text())
    assert not result["complete"] and measured(result) == {(arm, *cell) for arm, cell in product(fused_torch.ARMS, CELLS[:1])}


def test_what_does_not_fit_into_the_time_is_named(output: Path) -> None:
    code, result = run(output, "--seconds", "0")
    assert code == 0 and result["measurements"] == []
    late = {(e["arm"], e["metric"], e["tokens"], e["batch"]) for e in result["not_measured"] if "of --seconds" in e["reason"]}
    assert late == {(arm, *cell) for arm, cell in product(fused_torch.ARMS, CELLS)}


def test_sixteen_bits_are_held_to_their_noise_floor() -> None:
    with torch.no_grad():
        exact, rounded = gpu_arms.check_two_layers("tiny", "bf16", 4, "cpu")
    assert exact.passed and exact.noise_floor is None
    assert rounded.passed and rounded.allowed == 2 * rounded.noise_floor and 1e-4 < rounded.noise_floor < 0.1
    assert not gpu_arms.Parity("NaN", float("nan"), 1.0).passed


def test_missing_packages_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_arms.importlib.util, "find_spec", lambda name: None if name == "mobius" else object())
    assert gpu_arms.why_no_onnxruntime("cpu") == "mobius is not installed"


def test_statistics() -> None:
    found = gpu.statistics([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found["median_ms"] == 4 and found["ratio_to_base"] == 2 and found["ratio_interval"] == [2, 3]
    assert gpu.statistics([2.0], None)["ratio_to_base"] is None


@pytest.mark.parametrize(("late", "slept"), [(1, 2), (9, 3)])
def test_a_head_start_that_is_too_short_is_made_longer(late: int, slept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's events stood in for: `late` times the device comes to the call before the host has launched it."""
    sleeps: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def query(self) -> bool:
            return len(sleeps) <= late

        def elapsed_time(self, stop: Event) -> float:
            return 1.5

        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleeps.append, raising=False)
    step = gpu_arms.Step(lambda: None, lambda: None, "cuda")
    assert step.milliseconds(head_start=False) == 1.5 and sleeps == []
    if slept < len(gpu_arms.HEAD_STARTS):
        assert step.milliseconds(head_start=True) == 1.5
    else:
        with pytest.raises(RuntimeError, match="longer than 2e\\+08 GPU cycles"):
            step.milliseconds(head_start=True)
    assert sleeps == list(gpu_arms.HEAD_STARTS[:slept])


def on_gpu(results: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHON": sys.executable, "PARTS": "latency", "DTYPES": "fp32", "LEAST": "20"} | environment
    own["GPU_ARGS"] = " ".join([*(part for part in TINY if part not in ("--dtypes", "fp32")), "--no-compile"])
    command = [str(BENCHMARKS / "on_gpu.sh"), str(results), *more]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300, check=False)


def test_the_whole_evidence_comes_in_calls_that_go_on(tmp_path: Path) -> None:
    assert on_gpu(tmp_path, "10").returncode == 75  # no time for anything
    assert list(tmp_path.iterdir()) == []
    done = on_gpu(tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu-fp32.json").read_text())
    assert result["complete"] and result["measurements"] and all(check["passed"] for check in result["parity"])
    written = (tmp_path / "gpu-fp32.json").stat().st_mtime_ns
    assert on_gpu(tmp_path, "10").returncode == 0  # nothing is left to do
    assert (tmp_path / "gpu-fp32.json").stat().st_mtime_ns == written
    (tmp_path / "gpu-fp32.json").write_text(json.dumps(result | {"parity": [{"passed": False}]}, indent=1))
    assert on_gpu(tmp_path, "10").returncode == 1
    assert on_gpu(tmp_path, "10", "more").returncode == 2


HAS_CUDA_RUNTIME = any(each.metadata["Name"] == "onnxruntime-gpu" for each in importlib.metadata.distributions())


@pytest.mark.skipif(HAS_CUDA_RUNTIME, reason="nothing is missing here")
def test_what_cannot_run_is_said_and_is_no_success(tmp_path: Path) -> None:
    driver = driver_in(tmp_path / "bin")
    artifacts = on_gpu(tmp_path / "results", PARTS="artifacts", PATH=driver)
    assert artifacts.returncode == 3 and artifacts.stderr.startswith("artifacts: onnxruntime-gpu==")
    ended = on_gpu(tmp_path / "results", DTYPES="fp33")
    assert ended.returncode == 3 and "gpu.py ended before" in ended.stderr


def test_kept_runs_travel_without_their_adapters(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for kept in ("frontier/run/record.json", "frontier/adapters/run/adapter_model.safetensors"):
        (first / kept).parent.mkdir(parents=True)
        (first / kept).write_text("{}")
    assert on_gpu(first, PARTS="none").returncode == 0
    second.mkdir()
    (first / "runs.tar.gz").rename(second / "runs.tar.gz")
    assert on_gpu(second, PARTS="none").returncode == 0
    assert [path.relative_to(second).as_posix() for path in second.rglob("*.*")] == ["runs.tar.gz", "frontier/run/record.json"]


def driver_in(directory: Path) -> str:
    """A PATH on which there is an NVIDIA driver."""
    directory.mkdir()
    (directory / "nvidia-smi").write_text("")
    (directory / "nvidia-smi").chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


def missing(python: str = sys.executable, **environment: str) -> set[str]:
    """Names of packages."""
    command = [str(BENCHMARKS / "on_gpu.sh"), "--missing"]
    own = {"PYTHON": python} | environment
    printed = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True).stdout
    return {re.split("[=~<>]", line)[0] for line in printed.splitlines()} - {""}


@pytest.mark.skipif(HAS_CUDA_RUNTIME, reason="nothing is missing here")
def test_what_a_machine_lacks_is_named_as_it_is_locked(tmp_path: Path) -> None:
    of_gpu = {"onnxruntime-gpu"}  # if this machine has one
    assert missing() <= of_gpu
    driver = driver_in(tmp_path / "bin")
    assert missing(PATH=driver) == of_gpu
    assert {"torch", "onnxruntime-gpu", "peft", "mobius-onnx"} <= missing(f"{sys.executable} -S", PATH=driver)
    old = tmp_path / "onnx_ir-1.0.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: onnx-ir\nVersion: 1.0.0\n")
    assert missing(PYTHONPATH=str(tmp_path)) - of_gpu == {"onnx-ir"}
    on_cpu = [sys.executable, str(BENCHMARKS / "missing.py"), "--cpu"]
    assert subprocess.run(on_cpu, env=os.environ | {"PATH": driver}, capture_output=True, text=True, check=True).stdout == "\n"


def test_what_the_benchmarks_import_is_among_it() -> None:
    """An import that only training, scoring or drawing reaches would end a run on a GPU after its first minutes."""
    named = missing(f"{sys.executable} -S") | {"onnxruntime"}
    files = [
        *(BENCHMARKS / "accuracy").rglob("*.py"),
        *(BENCHMARKS / f"{name}.py" for name in ("common", "fused_torch", "gpu", "gpu_arms")),
    ]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    owners = importlib.metadata.packages_distributions()
    others = {name.lower().replace("_", "-") for module in modules for name in owners.get(module.partition(".")[0], [])} - {"flora-export"}
    assert "rouge-score" in others
    assert others <= named
