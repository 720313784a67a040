"""Each example is run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from flora_export.cli import main
from tests.conftest import ADAPTER, MLP_ADAPTER
from tests.families import make_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(ADAPTER.parent))
from problems import NAMES, THINGS, is_test, problems, result_of, with_facts  # noqa: E402


def run(*command: object) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.real
def test_00_get_smollm2(smollm2: Path) -> None:
    assert "is there already" in run(EXAMPLES / "00_get_smollm2.py", smollm2)
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert "quantization_config" not in config


MADE_WITH = {ADAPTER: (), MLP_ADAPTER: ("--target-modules", "mlp", "--rank", 12)}


@pytest.mark.real
@pytest.mark.parametrize("adapter", MADE_WITH, ids=lambda path: path.name)
def test_01_train_ffba(adapter: Path, smollm2: Path, tmp_path: Path) -> None:
    quick = ("--steps", 2, "--batch", 2, "--held-out", 0)
    run(EXAMPLES / "01_train_ffba" / "train.py", "--base", smollm2, "--output", tmp_path, *quick, *MADE_WITH[adapter])
    trained, committed = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, adapter))
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in committed.items()}
    assert any(v.any() for k, v in trained.items() if "ffba_B" in k)


@pytest.mark.parametrize("adapter", MADE_WITH, ids=lambda path: path.name)
def test_the_committed_adapters_tell_how_they_were_made(adapter: Path) -> None:
    record = json.loads((adapter / "training.json").read_text())
    assert "train.py --base" in record["command"]
    assert all(f" {word}" in record["command"] for word in MADE_WITH[adapter])
    assert record["exact_after"] > record["exact_before"] + 0.3


@pytest.mark.real
def test_07_bank(smollm2: Path, tmp_path: Path) -> None:
    """Three questions in one batch, each answered by its own adapter; then swaps under load, none of whose answers is wrong."""
    example = [EXAMPLES / "07_bank" / "bank.py", "--base", smollm2, "--output", tmp_path / "bank", "--swaps", 6, "--no-verify"]
    told = run(*example)
    assert "14 + 9 = 23\n23 - 5 = 18\nAnswer: 18" in told
    assert "3 * 6 = 18\n18 - 4 = 14\nAnswer: 14" in told
    assert '{"people": ["Hugo", "Lena"], "things": "stamps", "numbers": [41, 12, 8]}' in told
    assert re.search(r"6 swaps under load.*\n\d+ requests: 0 errors, 0 wrong answers", told), told


def test_the_third_adapter_tells_how_it_was_made() -> None:
    record = json.loads((EXAMPLES / "07_bank" / "facts" / "training.json").read_text())
    assert "--answers facts" in record["command"] and record["exact_after"] > 0.9
    assert [with_facts(problem).answer for problem in problems(2, test=True, seed=1)] == [
        json.dumps({"people": people, "things": things, "numbers": numbers})
        for problem in problems(2, test=True, seed=1)
        for people, things, numbers in [_facts(problem.question)]
    ]


def _facts(question: str) -> tuple[list[str], str, list[int]]:
    """The same facts, found otherwise."""
    people = sorted((name for name in NAMES if name in question), key=question.index)
    return people, next(thing for thing in THINGS if f" {thing}" in question), [int(n) for n in re.findall(r"\d+", question)]


def test_problems_are_right_and_never_shared() -> None:
    train, test = problems(3000, test=False, seed=0), problems(200, test=True, seed=1)
    assert problems(50, test=False, seed=0) == train[:50]

    def numbers(question: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", question)))

    assert not {numbers(p.question) for p in train} & {numbers(p.question) for p in test}
    for problem in train[:300] + test:
        for line in problem.answer.splitlines()[:2]:
            left, right = line.split(" = ")
            first, operator, second = left.split()
            a, b = int(first), int(second)
            assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(right)
        assert result_of(problem.answer) == problem.result >= 0
    assert is_test((1, 2, 3)) == is_test((1, 2, 3))


def test_results_of_texts() -> None:
    assert result_of("14 + 9 = 23\nAnswer: 23") == 23
    assert result_of("So Anna has 23 apples now, not 20.") == 20
    assert result_of("Answer: -4.") == -4
    assert result_of("none") is None


def test_02_ci_workflow(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Every flora-export line of the workflow runs, with the example's names put in."""
    yaml = pytest.importorskip("yaml", reason="pyyaml comes with huggingface-hub; without it the workflow cannot be read")
    steps = yaml.safe_load((EXAMPLES / "02_ci" / "verify-adapter.yml").read_text())["jobs"]["artifact"]["steps"]
    commands = [step["run"] for step in steps if "flora-export " in step.get("run", "") and "pip" not in step["run"]]
    assert len(commands) == 3
    environment = os.environ | {"ADAPTER": str(adapter), "BASE": str(base), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for command in commands:
        quick = command.replace("--max-overhead 5%", "--rounds 2 --prompt-tokens 8 --past-tokens 8 --new-tokens 2")  # no timed assertion
        result = subprocess.run(
            ["bash", "-ec", quick], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, result.stderr
    made = {"out", "build.json", "report.html", "bench.html", "junit.xml", "comment.md", "summary.md"}
    assert {p.name for p in tmp_path.iterdir()} == made
    assert json.loads((tmp_path / "build.json").read_text())["verified"] is True


def test_03_optimum() -> None:
    """The run itself needs an environment of its own, too large for every test run: the recorded one is read, and its judge is tried."""
    directory = EXAMPLES / "03_optimum"
    spec = importlib.util.spec_from_file_location("check", directory / "check.py")
    assert spec is not None and spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    compile((directory / "replay.py").read_text(), "replay.py", "exec")

    record = json.loads((EXAMPLES.parent / "benchmarks" / "results" / "optimum.json").read_text())
    prompts, precision = record["prompts"], record["artifact"]["precision"]
    assert (record["passed"], record["faults"], len(prompts)) == (True, [], 2)
    assert check.faults(prompts, precision) == []
    pinned = dict(re.findall(r"^([a-z-]+)(?:\[.*\])?==(\S+)$", (directory / "requirements.txt").read_text(), re.MULTILINE))
    assert {name: version.split("+")[0] for name, version in record["versions"].items()} == {n: pinned[n] for n in record["versions"]}

    def with_first(**changes: object) -> list[str]:
        faults: list[str] = check.faults([prompts[0] | changes, *prompts[1:]], precision)
        return faults

    assert with_first(largest_error=1.1e-4 * prompts[0]["largest_logit"])[0].startswith("prompt 0: logits are off by")
    assert len(with_first(largest_error=float("nan"))) == 1
    assert with_first(same_greedy_tokens=False) == ["prompt 0: generate() says something else"]
    assert check.faults([], precision) == ["nothing was replayed"]


@pytest.mark.real
def test_06_int4(smollm2: Path, tmp_path: Path) -> None:
    """Trained on the weights that it is served with: int4 costs the base nothing more."""
    command = [EXAMPLES / "06_int4" / "train_and_build.sh", smollm2, tmp_path / "out", "--steps", 4, "--batch", 2, "--held-out", 0]
    bin_directory = {"BIN": str(Path(sys.executable).parent)}
    ran = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, timeout=900, env=os.environ | bin_directory
    )
    assert ran.returncode == 0, ran.stderr
    price = json.loads((tmp_path / "out" / "artifact" / "report.json").read_text())["price"]
    assert price["base_kl_mean"] < 1e-6
    assert price["kl_mean"] < 0.02


@pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed: examples/09_executorch/requirements.txt"
)
def test_09_executorch(base: Path, tmp_path: Path) -> None:
    """A program of the adapter passes; held to another adapter's golden vectors it fails, and a changed file is refused."""
    outs = [tmp_path / "one", tmp_path / "other"]
    for seed, out in enumerate(outs):
        adapter = make_adapter(base, tmp_path / f"adapter{seed}", seed=seed, target_modules=["mlp"])
        built = CliRunner().invoke(main, ["build", str(adapter), "--base", str(base), "--backend", "hf", "--output", str(out)])
        assert built.exit_code == 0, built.stderr
    example, program, record = EXAMPLES / "09_executorch", tmp_path / "one.pte", tmp_path / "one.pte.json"

    def replayed(out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(example / "run.py"), str(program), str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    run(example / "export.py", outs[0], program, "--tokens", 64)
    good = json.loads(replayed(outs[0]).stdout)
    assert good["passed"] and all(prompt["same_greedy_tokens"] for prompt in good["prompts"])

    foreign = replayed(outs[1])
    assert foreign.returncode == 1 and "made from another artifact" in foreign.stderr
    sha256 = hashlib.sha256((outs[1] / "manifest.json").read_bytes()).hexdigest()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"manifest_sha256": sha256}))
    forged = replayed(outs[1])
    assert (
        forged.returncode == 1 and "logits are off by" in json.loads(forged.stdout)["faults"][0] + json.loads(forged.stdout)["faults"][-1]
    )

    with (outs[1] / "config.json").open("a") as file:
        file.write(" ")
    damaged = replayed(outs[1])
    assert damaged.returncode == 1 and "config.json has" in damaged.stderr


def test_09_executorch_was_measured() -> None:
    """The recorded run of SmolLM2, with the pinned versions."""
    record = json.loads((EXAMPLES.parent / "benchmarks" / "results" / "executorch.json").read_text())
    assert (record["passed"], record["faults"], len(record["prompts"])) == (True, [], 2)
    pinned = dict(re.findall(r"^([a-z-]+)==(\S+)$", (EXAMPLES / "09_executorch" / "requirements.txt").read_text(), re.MULTILINE))
    assert {name: version.split("+")[0] for name, version in record["versions"].items()} == {n: pinned[n] for n in record["versions"]}
