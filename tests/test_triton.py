"""A Triton repository on disk, without a server: what is published, what never goes live, rollback, and the check of config.pbtxt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from flora_export.artifact import Artifact, open_artifact, seal
from flora_export.backends.triton import steps
from flora_export.backends.triton.check import config_faults
from flora_export.backends.triton.config import Serving, Warmup, decoder_config, parse, read_serving
from flora_export.backends.triton.program.generation import Job, Model, Piece, RequestError, Settings, StopText, read_messages
from flora_export.backends.triton.program.scheduler import Scheduler
from flora_export.backends.triton.repository import check, live, make_live, staged_version, versions
from flora_export.cli import main
from flora_export.errors import ArtifactError, BackendError, VerificationError
from flora_export.generate import generate
from flora_export.pipeline import BuildOptions, build
from flora_export.publish import Published, generation_faults, publish, roll_back
from tests.conftest import silent
from tests.families import make_adapter, make_speaking_base

pytest.importorskip("tritonclient.grpc", reason="extra triton is not installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base that has a tokenizer, and an adapter."""
    root = tmp_path_factory.mktemp("triton")
    base = make_speaking_base(root / "base")
    return base, make_adapter(base, root / "adapter", alpha=32.0)


@pytest.fixture(scope="module")
def artifact(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(sources[1], str(sources[0]), tmp_path_factory.mktemp("artifact") / "out", BuildOptions(), silent)[0]


@pytest.fixture(scope="module")
def published(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two versions, the second live. Tests that change it take a copy."""
    repo = tmp_path_factory.mktemp("published") / "repo"
    for _ in range(2):
        publish(artifact, repo, Serving(), silent)
    return repo


@pytest.fixture
def repo(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "repo"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# publishing


def test_what_is_published(published: Path, artifact: Artifact) -> None:
    assert live(published) == {"decoder": 2, "generate": 2}
    assert check(published) == []
    for model in ("decoder", "generate"):
        assert versions(published, model) == [1, 2]
        version = open_artifact(published / model / "2")
        assert version.manifest == artifact.manifest
        assert (published / model / "config.pbtxt").read_bytes() == (version.path / "config.pbtxt").read_bytes()
    weights = [published / model / "2" / "model.onnx.data" for model in ("decoder", "generate")]
    assert weights[0].samefile(weights[1])  # once on the disk for both models,
    assert not weights[0].samefile(artifact.path / "model.onnx.data")  # and out of the reach of who changes OUT
    assert [path.name for path in published.parent.iterdir()] == ["repo"]  # nothing is left beside it


def test_the_configuration_says_what_the_graph_says(published: Path, artifact: Artifact) -> None:
    config = parse((published / "decoder" / "config.pbtxt").read_text())
    assert [tensor.name for tensor in config.input] == [tensor.name for tensor in artifact.manifest.inputs]
    assert [tensor.name for tensor in config.output] == [tensor.name for tensor in artifact.manifest.outputs]
    assert list(config.output[0].dims) == [-1, artifact.manifest.outputs[0].shape[-1]]
    assert list(config.input[2].dims) == [2, -1, 16]
    assert (config.backend, config.max_batch_size, list(config.version_policy.specific.versions)) == ("onnxruntime", 8, [2])
    golden = load_file(artifact.path / "golden.safetensors")["prompt.0.input_ids"]
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["input_ids"].dims) == [len(golden)]
    assert np.array_equal(np.fromfile(published / "decoder" / "warmup" / "2.input_ids", "<i8"), golden)
    generating = parse((published / "generate" / "config.pbtxt").read_text())
    assert generating.model_transaction_policy.decoupled
    assert generating.dynamic_batching.default_queue_policy.max_queue_size == 256


def _damage_weights(path: Path) -> None:
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 4
    (path / "model.onnx.data").write_bytes(data)


def _shift_golden(path: Path) -> None:
    """Golden vectors that the model does not give, with hashes that fit: only the replay can tell."""
    tensors = load_file(path / "golden.safetensors")
    tensors["prompt.0.logits"] = tensors["prompt.0.logits"] + np.float32(0.5)
    save_file(tensors, path / "golden.safetensors")
    seal(path, open_artifact(path).manifest)


def _end_elsewhere(path: Path) -> None:
    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = 7
    (path / "genai_config.json").write_text(json.dumps(config))
    seal(path, open_artifact(path).manifest)


def _break_generation(path: Path) -> None:
    (path / "genai_config.json").write_text('{"model": {"context_length": 9, "eos_token_id": 2, "type": "nonsense"}}')
    seal(path, open_artifact(path).manifest)


def _break_decoding(path: Path) -> None:
    """Keys go where the values should: ONNX Runtime GenAI loads it and says nothing, and its answers are wrong from the second token on."""
    config = json.loads((path / "genai_config.json").read_text())
    names = config["model"]["decoder"]["inputs"]
    names["past_key_names"], names["past_value_names"] = names["past_value_names"], names["past_key_names"]
    (path / "genai_config.json").write_text(json.dumps(config))
    seal(path, open_artifact(path).manifest)


BROKEN = [
    (_damage_weights, VerificationError, "model.onnx.data is not the file that was built"),
    (_shift_golden, VerificationError, "golden prompt 0: logits are off"),
    (_end_elsewhere, VerificationError, "`generate` would end answers at"),
    (_break_decoding, VerificationError, "`generate` answers golden prompt 0 with token"),
    (_break_generation, VerificationError, "do not load for `generate`"),
    (lambda path: (path / "golden.safetensors").unlink(), ArtifactError, "golden.safetensors is missing"),
    (lambda path: (path / "model.onnx").unlink(), ArtifactError, "model.onnx is missing"),
]


@pytest.mark.parametrize(("break_it", "error", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_what_is_wrong_never_goes_live(artifact: Artifact, repo: Path, tmp_path: Path, break_it: Any, error: Any, message: str) -> None:
    out = Path(shutil.copytree(artifact.path, tmp_path / "out"))
    break_it(out)
    before = snapshot(repo)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        publish(open_artifact(out), repo, Serving(), silent)
    assert snapshot(repo) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "repo"}


def _next_token(path: Path, margin: float) -> int:
    """Make another token the recorded second one, with logits that prefer it by `margin` to the one that the model prefers."""
    tensors = load_file(path / "golden.safetensors")
    logits, tokens = tensors["prompt.1.logits"], tensors["prompt.1.tokens"]
    right = int(tokens[1])
    tokens[1] = np.argsort(logits[1])[-2]
    logits[1, tokens[1]] = logits[1, right] + np.float32(margin)
    save_file(tensors, path / "golden.safetensors")
    return right


def test_generate_must_answer_golden_prompts(artifact: Artifact, tmp_path: Path) -> None:
    """Token for token, but for a tie that rounding decides."""
    assert generation_faults(artifact) == []
    out = Path(shutil.copytree(artifact.path, tmp_path / "out"))
    right = _next_token(out, 0.1)
    (fault,) = generation_faults(open_artifact(out))
    assert f"`generate` answers golden prompt 1 with token {right} at step 1, not" in fault
    out = Path(shutil.copytree(artifact.path, tmp_path / "tie"))
    _next_token(out, 1e-5)  # fp32, below 1e-4
    assert generation_faults(open_artifact(out)) == []


def test_without_golden_vectors_nothing_goes_live(sources: tuple[Path, Path], tmp_path: Path) -> None:
    unproved, _ = build(sources[1], str(sources[0]), tmp_path / "out", BuildOptions(verify=False), silent)
    with pytest.raises(ArtifactError, match="only with golden vectors"):
        publish(unproved, tmp_path / "repo", Serving(), silent)
    assert not (tmp_path / "repo").exists()


def test_what_publishing_needs_is_asked_for_before_the_build(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    monkeypatch.setattr("flora_export.publish.build", None)
    without = run("build", sources[1], "--base", sources[0], "--backend", "triton", "--output", tmp_path / "repo")
    assert without.exit_code == 3
    assert "pip install 'flora-export[triton]'" in without.output
    assert list(tmp_path.iterdir()) == []


def test_a_limit_below_the_servers_own_question_does_not_go_live(artifact: Artifact, tmp_path: Path) -> None:
    refused = run("triton", "--max-prompt", 1, artifact.path, tmp_path / "repo")
    assert refused.exit_code == 1
    assert "--max-prompt is 1, but the first request, by which the server tries `generate`, has" in refused.output
    assert not (tmp_path / "repo" / "decoder" / "config.pbtxt").exists()


def test_a_publisher_that_is_interrupted_changes_nothing(artifact: Artifact, repo: Path) -> None:
    before = snapshot(repo)
    with pytest.raises(KeyboardInterrupt), staged_version(artifact, repo, Serving()):
        raise KeyboardInterrupt
    assert snapshot(repo) == before


def test_the_next_version_is_served_as_the_one_before(artifact: Artifact, sources: tuple[Path, Path], tmp_path: Path) -> None:
    """Limits that protect a server do not go with a version; an option that is given changes one of them."""
    repo = tmp_path / "repo"
    limits = ("--max-tokens", 64, "--max-prompt", 500, "--max-queue", 9, "--threads", 2, "--no-check-files")
    assert run("triton", *limits, artifact.path, repo).exit_code == 0
    expected = Serving(max_tokens=64, max_prompt=500, max_queue=9, threads=2, check_files=False)
    assert read_serving(repo) == expected
    assert run("triton", "--max-queue", 8, artifact.path, repo).exit_code == 0
    expected = dataclasses.replace(expected, max_queue=8)
    assert read_serving(repo) == expected
    built = run("build", sources[1], "--base", sources[0], "--backend", "triton", "--output", repo, "--force")
    assert built.exit_code == 0, built.output
    assert live(repo)["decoder"] == 3
    assert read_serving(repo) == expected
    (repo / "generate" / "config.pbtxt").write_text("broken")
    refused = run("triton", artifact.path, repo)
    assert refused.exit_code == 2
    assert "Make a version live with --to N" in refused.output
    assert run("triton", repo, "--to", 2).exit_code == 0
    assert read_serving(repo) == dataclasses.replace(expected, max_queue=8)


def test_a_publisher_that_is_killed_changes_nothing(artifact: Artifact, repo: Path) -> None:
    """What it leaves beside the repository goes with the next publisher."""
    before = snapshot(repo)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom flora_export.artifact import open_artifact\n"
        "from flora_export.backends.triton.config import Serving\nfrom flora_export.backends.triton.repository import staged_version\n"
        "with staged_version(open_artifact(Path(sys.argv[1])), Path(sys.argv[2]), Serving()): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(artifact.path), str(repo)], check=False, timeout=60)
    assert killed.returncode == -9
    assert snapshot(repo) == before
    assert len(list(repo.parent.iterdir())) == 2
    assert publish(artifact, repo, Serving(), silent).version == 3
    assert [path.name for path in repo.parent.iterdir()] == ["repo"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_version_that_a_killed_publisher_has_moved_in_goes(artifact: Artifact, repo: Path, tmp_path: Path, existing: bool) -> None:
    """Nothing names it: the next publisher takes it out, and its number is free."""
    place = repo if existing else tmp_path / "other" / "repo"
    place.parent.mkdir(exist_ok=True)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom flora_export.artifact import open_artifact\n"
        "from flora_export.backends.triton import repository\nfrom flora_export.backends.triton.config import Serving\n"
        "repository.go_live = lambda *_: os.kill(os.getpid(), 9)\n"
        "with repository.staged_version(open_artifact(Path(sys.argv[1])), Path(sys.argv[2]), Serving()): pass"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(artifact.path), str(place)], check=False, timeout=60)
    assert killed.returncode == -9
    expected = 3 if existing else 1
    assert versions(place, "generate")[-1] == expected
    assert publish(artifact, place, Serving(), silent).version == expected
    assert versions(place, "decoder") == list(range(1, expected + 1))
    assert [path.name for path in place.parent.iterdir()] == ["repo"]
    assert check(place) == []


@pytest.mark.parametrize(("decoder", "generate"), [(2, 1), (1, 2)])
def test_a_rollback_where_a_killed_publisher_has_left_two_live_versions(repo: Path, decoder: int, generate: int) -> None:
    for model, version in (("decoder", decoder), ("generate", generate)):
        shutil.copyfile(repo / model / str(version) / "config.pbtxt", repo / model / "config.pbtxt")
    assert any("live versions differ" in fault for fault in check(repo))
    assert roll_back(repo, None).version == 1
    assert live(repo) == {"decoder": 1, "generate": 1}
    assert check(repo) == []


def test_two_publishers_at_once(artifact: Artifact, repo: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: publish(artifact, repo, Serving(), silent).version, range(2)))
    assert sorted(done) == [3, 4]
    assert live(repo) == {"decoder": 4, "generate": 4}
    assert check(repo) == []


def test_a_repository_behind_a_link(artifact: Artifact, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(repo)
    assert publish(artifact, tmp_path / "elsewhere" / "link", Serving(), silent).version == 3
    assert roll_back(tmp_path / "elsewhere" / "link", None).version == 2
    assert check(repo) == []


def test_a_first_publisher_that_fails_leaves_the_lock_to_the_next(artifact: Artifact, tmp_path: Path) -> None:
    """It removes the directory that the next one waits for: that one makes it again."""
    repo = tmp_path / "repo"

    def fail_while_another_waits(pool: ThreadPoolExecutor) -> Future[Published]:
        with contextlib.suppress(KeyboardInterrupt), staged_version(artifact, repo, Serving()):
            waiting = pool.submit(publish, artifact, repo, Serving(), silent)
            while not waiting.done() and not any("flock" in line for line in _stacks()):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return waiting

    with ThreadPoolExecutor(1) as pool:
        assert fail_while_another_waits(pool).result(60).version == 1
    assert check(repo) == []


def _stacks() -> list[str]:
    """The line that each thread is at."""
    return [traceback.extract_stack(frame, 2)[-1].line or "" for frame in sys._current_frames().values()]


def test_directories_of_others_are_left_alone(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "repo" / "decoder" / "1").mkdir(parents=True)
    (tmp_path / "repo" / "decoder" / "1" / "model.onnx").write_bytes(b"theirs")
    with pytest.raises(ArtifactError, match="was not published by flora-export"):
        publish(artifact, tmp_path / "repo", Serving(), silent)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="no directory"):
        publish(artifact, tmp_path / "file", Serving(), silent)


def test_an_artifact_without_a_tokenizer_has_the_decoder_alone(base: Path, adapter: Path, artifact: Artifact, tmp_path: Path) -> None:
    mute, _ = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert publish(mute, tmp_path / "repo", Serving(), silent).models == ("decoder",)
    assert live(tmp_path / "repo") == {"decoder": 1}
    assert check(tmp_path / "repo") == []
    publish(artifact, tmp_path / "repo", Serving(), silent)
    with pytest.raises(ArtifactError, match="serves generate, but the artifact has no"):
        publish(mute, tmp_path / "repo", Serving(), silent)


# rollback


def test_rollback(repo: Path) -> None:
    assert roll_back(repo, None).version == 1
    assert live(repo) == {"decoder": 1, "generate": 1}
    assert check(repo) == []
    with pytest.raises(ArtifactError, match="there is none before it"):
        roll_back(repo, None)
    roll_back(repo, 2)
    assert live(repo) == {"decoder": 2, "generate": 2}
    with pytest.raises(ArtifactError, match=r"decoder has no version 7; it has 1, 2"):
        roll_back(repo, 7)


def test_rollback_goes_where_the_live_version_came_from(artifact: Artifact, repo: Path) -> None:
    """And not to the number below it, which was given up."""
    publish(artifact, repo, Serving(), silent)
    assert roll_back(repo, None) == Published(2, 3, ("decoder", "generate"))
    assert publish(artifact, repo, Serving(), silent).version == 4
    assert roll_back(repo, None).version == 2
    assert roll_back(repo, None).version == 1


def test_no_rollback_to_a_version_that_one_model_lacks(repo: Path) -> None:
    shutil.rmtree(repo / "generate" / "1")
    with pytest.raises(ArtifactError, match="generate has no version 1; it has 2"):
        roll_back(repo, None)
    assert live(repo) == {"decoder": 2, "generate": 2}


def test_both_configurations_or_none(artifact: Artifact, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second cannot be replaced: the first comes back."""
    real = steps._replace
    before = snapshot(repo)

    def replace(source: Path, target: Path) -> None:
        if target.parent.name == "generate":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(steps, "_replace", replace)
    with pytest.raises(BackendError, match="No space left on device"):
        roll_back(repo, 1)
    assert snapshot(repo) == before
    with pytest.raises(BackendError, match="what was live still is"):
        publish(artifact, repo, Serving(), silent)
    assert snapshot(repo) == before
    monkeypatch.undo()
    assert publish(artifact, repo, Serving(), silent).version == 3
    assert check(repo) == []


def test_no_rollback_to_a_damaged_version(repo: Path) -> None:
    _damage_weights(repo / "generate" / "1")
    with pytest.raises(ArtifactError, match=r"generate/1/model.onnx.data is not the file"):
        make_live(repo, 1)
    assert live(repo) == {"decoder": 2, "generate": 2}


@pytest.mark.parametrize("name", ["model.py", "program/generation.py", "program/scheduler.py"])
def test_no_rollback_to_a_changed_program(repo: Path, name: str) -> None:
    with (repo / "generate" / "1" / name).open("a") as stream:
        stream.write("# changed\n")
    with pytest.raises(ArtifactError, match=f"generate/1/{name} is not the file that was published"):
        make_live(repo, 1)
    (repo / "generate" / "1" / name).unlink()
    with pytest.raises(ArtifactError, match=f"generate/1/{name} is missing"):
        make_live(repo, 1)


# the command line


def test_the_command(artifact: Artifact, repo: Path, tmp_path: Path) -> None:
    result = run("triton", artifact.path, repo, "--concurrent", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"repository": str(repo), "version": 3, "former": 2, "models": ["decoder", "generate"]}
    assert 'key: "concurrent_requests" value { string_value: "3" }' in (repo / "generate" / "config.pbtxt").read_text()
    assert "version 2 is live (before: version 3)" in run("triton", repo, "--rollback").stdout
    assert run("triton", repo, "--to", 3).exit_code == 0
    assert run("triton", repo, "--check").stdout.splitlines()[-1] == "no faults"
    _damage_weights(repo / "decoder" / "3")
    result = run("triton", repo, "--check", "--json")
    assert result.exit_code == 1
    assert "decoder/3/model.onnx.data is not the file" in json.loads(result.stdout)["faults"][0]
    assert run("triton", repo).exit_code == 2
    assert run("triton", artifact.path, repo, "--rollback").exit_code == 2
    assert run("triton", repo, "--rollback", "--check").exit_code == 2
    assert run("triton", tmp_path / "nowhere", "--check").exit_code == 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_build_for_triton(precision: str, sources: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sources
    command = ["build", adapter, "--base", base, "--backend", "triton", "--precision", precision, "--output", tmp_path / "repo", "--json"]
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verified"] is True
    assert live(tmp_path / "repo") == {"decoder": 1, "generate": 1}
    assert run(*command).exit_code == 2
    assert run(*command, "--force").exit_code == 0
    assert live(tmp_path / "repo") == {"decoder": 2, "generate": 2}
    assert run(*command[:-3], tmp_path / "other", "--no-verify").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


# config.pbtxt

FAULTS = [
    ("decoder", "max_batch_size: 8", "max_batch_size: -8", "max_batch_size is -8"),
    ("decoder", "max_batch_size: 8", "max_batch_size: 0", "the graph's first dimension is the batch"),
    ("decoder", "dims: [2, -1, 16]", "dims: [-2, -1, 16]", "has dims [-2, -1, 16]"),
    ("decoder", "dims: [2, -1, 16]", "dims: [2, 0, 16]", "has dims [2, 0, 16]"),
    ("decoder", "dims: [2, -1, 16]", "dims: [2, -1, 17]", "but the model has TYPE_FP32 [2, -1, 16]"),
    ("decoder", 'input { name: "input_ids"', 'input { name: "ids"', "input input_ids is missing"),
    ("decoder", 'output { name: "logits"', 'output { name: "logit"', "output logit is none of the model's"),
    ("decoder", 'input { name: "attention_mask"', 'input { name: "input_ids"', "input_ids is there 2 times"),
    ("decoder", 'name: "decoder"', 'name: "encoder"', "name is 'encoder'"),
    ("decoder", 'backend: "onnxruntime"', 'backend: "python"', "backend is 'python'"),
    ("decoder", 'backend: "onnxruntime"', 'backend: "tensorrt"', "there is no decoder/2/model.engine"),
    ("decoder", "count: 1", "count: 0", "instance_group has count 0"),
    ("decoder", "versions: 2", "versions: 9", "version 9, but there is no decoder/9/model.onnx"),
    ("decoder", "versions: 2", "versions: -1", "version -1, but there is no"),
    ("decoder", "specific { versions: 2 }", "latest { num_versions: 1 }", "must name one"),
    ("decoder", 'input_data_file: "2.input_ids"', 'input_data_file: "9.input_ids"', "bytes in warmup/9.input_ids"),
    ("decoder", "dynamic_batching {", "dynamic_batching { preferred_batch_size: 16", "preferred_batch_size [16]"),
    ("decoder", "max_batch_size", "max_batchsize", "does not fit Triton's schema"),
    ("decoder", "TYPE_INT64", "TYPE_INTEGER", "does not fit Triton's schema"),
    (
        "generate",
        'name: "max_tokens" data_type: TYPE_INT32',
        'name: "max_tokens" data_type: TYPE_FP32',
        "input max_tokens is TYPE_FP32 [1]",
    ),
    ("generate", 'output { name: "text_output"', 'output { name: "text"', "output text_output is missing"),
    ("generate", "model.py", "other.py", "default_model_filename is 'other.py'"),
]


@pytest.mark.parametrize(("model", "old", "new", "message"), FAULTS, ids=[f"{case[2]}" for case in FAULTS])
def test_faults_of_a_configuration(published: Path, artifact: Artifact, model: str, old: str, new: str, message: str) -> None:
    text = (published / model / "config.pbtxt").read_text()
    assert config_faults(published / model, artifact.manifest, text) == []
    assert old in text
    faults = config_faults(published / model, artifact.manifest, text.replace(old, new, 1))
    assert any(message in fault for fault in faults), faults


def test_check_names_what_is_wrong_with_a_repository(repo: Path) -> None:
    shutil.copyfile(repo / "generate" / "1" / "config.pbtxt", repo / "generate" / "config.pbtxt")
    assert check(repo) == ["the models' live versions differ (decoder 2, generate 1): publish or roll back again"]
    shutil.rmtree(repo / "generate" / "1")
    assert "generate/config.pbtxt names version 1, which is not there" in check(repo)


ENGINE = {"flavour": "tensorrt", "profiles": {name: {"batch": [1, 1, 4]} for name in ("prefill", "decode")}}


def test_tensorrt_and_gpus(artifact: Artifact) -> None:
    """The form for a TensorRT engine: written and checked, not run by us."""
    manifest = dataclasses.replace(artifact.manifest, backend="tensorrt", target="cuda", engine=ENGINE)
    config = parse(decoder_config(manifest, 1, Serving(threads=2), Warmup({}, {})))
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.engine")
    assert list(config.instance_group[0].profile) == ["0", "1"]  # prefill and decode
    assert config.max_batch_size == 4  # the engine's limit; the serving's is 8
    assert parse(decoder_config(manifest, 1, Serving(max_batch=2), Warmup({}, {}))).max_batch_size == 2
    with pytest.raises(BackendError, match="cannot serve an engine of TensorRT-RTX"):
        decoder_config(dataclasses.replace(manifest, engine=ENGINE | {"flavour": "rtx"}), 1, Serving(), Warmup({}, {}))
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert not config.parameters  # ONNX Runtime's own
    with pytest.raises(BackendError, match="cannot serve an artifact of backend hf"):
        decoder_config(dataclasses.replace(manifest, backend="hf"), 1, Serving(), Warmup({}, {}))


# what runs inside the server


def test_settings() -> None:
    assert Settings.read({}).temperature == 0
    assert Settings.read({"seed": 3}).temperature == Settings.read({"top_p": 0.5}).temperature == 1.0
    assert Settings.read({"top_k": 5, "temperature": 0}).temperature == 0
    assert Settings.read({"stop": "x"}).stop == Settings.read({"stop": ["x"]}).stop == ("x",)
    bad: list[dict[str, Any]] = [
        {"nonsense": 1}, {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 1.5}, {"temperature": math.nan}, {"temperature": "hot"},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"seed": 2**31}, {"stream": 1}, {"chat": "yes"}, {"stop": 3}, {"stop": ["a", ""]},
        {"stop": ["a"] * 17}, {"stop": ["a" * 257]},
    ]  # fmt: skip
    for given in bad:
        with pytest.raises(RequestError, match=next(iter(given))):
            Settings.read(given)


def test_stop_texts() -> None:
    """Whatever the pieces: what is shown is the text up to the first stop text, and nothing that may be a part of one is shown early."""
    text, stops = "the answer: 12\n\nUser: and now", ("\n\nUser", "\n\nSystem")
    for size in range(1, len(text)):
        stop, shown = StopText(stops), ""
        for start in range(0, len(text), size):
            shown += stop.push(text[start : start + size])
            assert "the answer: 12".startswith(shown)
        assert (shown, stop.hit) == ("the answer: 12", True)
    stop = StopText(("abc",))
    assert [stop.push("xab"), stop.push("d"), stop.push("ab"), stop.push("", last=True), stop.hit] == ["x", "abd", "", "ab", False]


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Model:
    return Model(artifact.path, threads=1)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model.decoder, 3)
    yield made
    made.stop()


def test_limits_of_a_prompt(model: Model) -> None:
    """Whatever makes a prompt long: contents, roles, many messages, what the template adds, or the JSON itself."""
    most = model.most_characters
    assert read_messages('[{"role": "user", "content": "you"}]', most) == [{"role": "user", "content": "you"}]
    with pytest.raises(RequestError, match=f"but may have {most}"):
        read_messages("[" * (most + 1), most)
    for messages in (
        [{"role": "user", "content": "a" * (most + 1)}],
        [{"role": "a" * (most + 1), "content": ""}],
        [{"role": "user", "content": ""}] * (model.context + 1),
    ):
        with pytest.raises(RequestError, match=f"characters is too long for {model.context} tokens"):
            model.encode(None, messages, Settings())
    plain, model._tokenizer.chat_template = model._tokenizer.chat_template, "{{ 'what ' * 10000000 }}"
    try:
        with pytest.raises(RequestError, match="50000000 characters is too long"):
            model.encode("what?", None, Settings())
    finally:
        model._tokenizer.chat_template = plain


def test_a_prompt_may_have_the_tokens_that_the_server_allows(artifact: Artifact, model: Model) -> None:
    plain = Settings(chat=False)
    tokens = model.encode("what is an answer?", None, plain)
    assert Model(artifact.path, 1, len(tokens)).encode("what is an answer?", None, plain) == tokens
    with pytest.raises(RequestError, match=f"has {len(tokens)} tokens, but may have {len(tokens) - 1}: shorten it"):
        Model(artifact.path, 1, len(tokens) - 1).encode("what is an answer?", None, plain)


def test_half_characters_are_refused(model: Model) -> None:
    for text in ("what \ud800", "\udc80"):
        with pytest.raises(RequestError, match="the prompt is not Unicode"):
            model.encode(text, None, Settings())
        with pytest.raises(RequestError, match="stop is not Unicode"):
            Settings.read({"stop": [text]})


class Client:
    """Collects what a job says."""

    def __init__(self, model: Model, text: str, **given: Any) -> None:
        settings = Settings.read(given)
        self.pieces: list[Piece] = []
        self.error, self.gone, self.done = "", False, threading.Event()
        self.job = Job(model, model.encode(text, None, settings), settings, self._send, self._fail, lambda: self.gone)

    def _send(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.reason:
            self.done.set()

    def _fail(self, message: str, kind: str) -> None:
        self.error = f"{kind}: {message}"
        self.done.set()

    def text(self) -> str:
        assert self.done.wait(60)
        assert not self.error
        return "".join(piece.text for piece in self.pieces)


def test_generation_is_the_artifacts(artifact: Artifact, model: Model, scheduler: Scheduler) -> None:
    """More requests than slots, streamed and not, one of them longer than a turn's part: each as flora-export generate answers it."""
    prompts = [f"what is {n}?" for n in range(8)] + ["you say what " * 200]
    clients = [Client(model, prompt, max_tokens=30, stream=n % 2 == 0) for n, prompt in enumerate(prompts)]
    for client in clients:
        scheduler.submit(client.job)
    wanted = [generate(artifact, [prompt], max_new_tokens=30)[0].text for prompt in prompts]
    assert len(clients[-1].job.prompt) > 512
    assert [client.text() for client in clients] == wanted
    assert len(clients[0].pieces) > 5
    assert len(clients[1].pieces) == 1
    bare = generate(artifact, [prompts[0]], max_new_tokens=30, adapter=False)[0].text
    assert bare != wanted[0]


def test_top_k_above_the_vocabulary_is_all_of_it(model: Model, scheduler: Scheduler) -> None:
    clients = [Client(model, "what?", max_tokens=8, seed=1, top_k=top_k) for top_k in (0, 2**31 - 1)]
    for client in clients:
        scheduler.submit(client.job)
    assert clients[0].text() == clients[1].text()


def test_a_client_that_goes_and_a_job_that_fails(model: Model, scheduler: Scheduler) -> None:
    gone, broken, well = (Client(model, "what?", max_tokens=n) for n in (1500, 20, 20))
    broken.job.prompt[0] = 10**6  # no such token: the runtime refuses it
    gone.gone = True
    for client in (gone, broken, well):
        scheduler.submit(client.job)
    assert well.text()
    assert gone.done.wait(60)
    assert broken.done.wait(60)
    assert gone.error.startswith("cancelled")
    assert broken.error.startswith("internal: generation failed")
    again = [Client(model, "what?", max_tokens=2) for _ in range(6)]  # all slots came free
    for client in again:
        scheduler.submit(client.job)
    assert len({client.text() for client in again}) == 1


def test_clients_that_cannot_be_told_keep_no_slot(model: Model, scheduler: Scheduler) -> None:
    """Sending fails, and saying so fails: the thread goes on, and the slots come free."""
    deaf = [Client(model, "what?", max_tokens=3) for _ in range(4)]

    def refuse(*_: object) -> None:
        raise RuntimeError("gone")

    for client in deaf:
        client.job.send = client.job.fail = refuse
        scheduler.submit(client.job)
    well = Client(model, "what?", max_tokens=3)
    scheduler.submit(well.job)
    assert well.text()
