"""Fleets: plans are refused in one line; what fails fails alone; a worker that is killed loses nothing; what is done is not done again."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flora_export.artifact import MANIFEST, changed_files, open_artifact
from flora_export.backends.triton.repository import live
from flora_export.base_model import file_sha256
from flora_export.cli import main
from flora_export.errors import BackendError, FloraExportError
from flora_export.fleet import run as fleet_run
from flora_export.fleet import worker
from flora_export.fleet.engine import Cluster, outcomes, started
from flora_export.fleet.plan import Job, read_plan
from flora_export.fleet.run import Fleet, run_fleet
from flora_export.fleet.state import Outcome, holding, inputs_of
from flora_export.fleet.worker import Task, do
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import make_adapter, make_speaking_base
from tests.fleet_work import dies, ends_a_machine, ends_unheard, hangs

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")

GOOD: dict[str, Any] = {"version": 1, "base": "base", "output": "out", "adapters": {"one": "a/one"}, "targets": {"cpu": {"backend": "hf"}}}
TRITON = {"backend": "onnxruntime", "repository": "repos/{adapter}"}


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("base", "a/one", "a/two", "b/one"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def write(place: Path, content: Any) -> Path:
    file = place / "plan.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must be a mapping"),
        ("- 1", "the plan is a list"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [id]", "not YAML"),
        ("a: &a [*a, *a]\n? *a\n: 1", "not YAML"),
        ("[" * 3000, "not YAML"),
        ("\xff\x00", "not YAML"),
        ("version: 1\nversion: 1", "'version' is given twice"),
        ("x" * (2**20 + 1), "more than 1048576 bytes"),
        (changed(version=2), "version is 2, but this reads 1"),
        (changed(version=True), "version is True"),
        (changed(base=...), "has no base"),
        (changed(base=3), "base is 3"),
        (changed(output=...), "names no output"),
        (changed(retry=3), "'retry', which is unknown"),
        (changed(adapters={}), "adapters is empty"),
        (changed(adapters=7), "adapters is 7"),
        (changed(adapters={"../one": "a/one"}), "a name becomes a directory"),
        (changed(adapters={".fleet": "a/one"}), "a name becomes a directory"),
        (changed(adapters={"a/b": "a/one"}), "a name becomes a directory"),
        (changed(adapters={"one": ["a/one"]}), "adapters.one is a list"),
        (changed(adapters=["c/*"]), "no directory is named as 'c/*'"),
        (changed(adapters=["a/*", "b/*"]), "would both be one"),
        (changed(adapters=["~nobody-of-that-name/*"]), "is no glob"),
        (changed(targets={"cpu": {"backend": ["hf"]}}), "targets.cpu.backend is a list, but must be one of"),
        (changed(targets={}), "targets must be names"),
        (changed(targets={"..": {"backend": "hf"}}), "a name becomes a directory"),
        (changed(targets={"cpu": {}}), "targets.cpu has no backend"),
        (changed(targets={"cpu": {"backend": "hf", "presicion": "fp32"}}), "'presicion', which is unknown"),
        (changed(targets={"cpu": {"backend": "hf", "precision": "fp8"}}), "targets.cpu.precision is 'fp8', but must be one of fp32"),
        (changed(targets={"cpu": {"backend": "hf", "merge": "no"}}), "must be true or false"),
        (changed(targets={"cpu": {"backend": "hf", "align": True}}), "must be a whole number"),
        (changed(targets={"cpu": {"backend": "triton"}}), "say `backend: onnxruntime, repository:"),
        (changed(adapters=["a/*"], targets={"cpu": {"backend": "onnxruntime", "repository": "repo"}}), "are both published in"),
        (changed(targets={"cpu": {"backend": "onnxruntime", "repository": "out/one"}}), "which an artifact lies in, or which lies in one"),
        (changed(targets={"cpu": {"backend": "onnxruntime", "repository": "out/one/cpu/r"}}), "which an artifact lies in, or which lies"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(place: Path, content: Any, said: str) -> None:
    result = CliRunner().invoke(main, ["fleet", str(write(place, content)), "--json"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stdout)["exit_code"] == 2
    assert not (place / "out").exists()


def test_a_plan_names_its_jobs(place: Path) -> None:
    plan = read_plan(write(place, changed(adapters=["a/*"], targets={"cpu": {"backend": "hf", "merge": False}, "serve": TRITON})))
    assert [job.name for job in plan.jobs] == ["one/cpu", "one/serve", "two/cpu", "two/serve"]
    job = plan.jobs[3]
    assert (job.checkpoint, job.output, job.base) == (place / "a/two", place / "out/two/serve", str(place / "base"))
    assert job.repository == place / "repos/two"
    assert plan.jobs[0].options == {"backend": "hf", "merge": False}
    assert read_plan(place / "plan.yaml", place / "other").jobs[0].output == place / "other/one/cpu"
    assert read_plan(write(place, changed(base="owner/model"))).base == "owner/model"
    (place / "a/.cache").mkdir()  # of a download, or of a build that runs there
    assert {job.adapter for job in read_plan(write(place, changed(adapters=["a/*"]))).jobs} == {"one", "two"}


def test_what_publishing_needs_is_asked_for_before_the_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(write(place, changed(targets={"serve": TRITON})))
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    monkeypatch.setattr("flora_export.pipeline.build", None)
    outcome = do(Task(plan.jobs[0]))
    assert (outcome.exit_code, outcome.state) == (3, "failed") and "flora-export[triton]" in str(outcome.message)


def test_a_plan_may_merge_mappings(place: Path) -> None:
    lines = [f"{key}: {json.dumps(value)}" for key, value in GOOD.items() if key != "targets"]
    lines.append("targets: {one: &one {backend: hf, merge: false}, two: {<<: *one, merge: true}}")
    plan = read_plan(write(place, "\n".join(lines)))
    assert {job.target: job.options for job in plan.jobs} == {
        "one": {"backend": "hf", "merge": False},
        "two": {"backend": "hf", "merge": True},
    }


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([0, 3], 3), ([3, 2, 0], 2), ([2, 3, 1], 1)])
def test_the_gravest_exit_code_is_the_fleets(place: Path, codes: list[int], expected: int) -> None:
    done = Fleet(read_plan(write(place, GOOD)), tuple(Outcome("one/cpu", "built", exit_code=code) for code in codes), 1.0)
    assert done.exit_code == expected


def test_two_fleets_are_not_at_work_on_one_output(place: Path) -> None:
    plan = read_plan(write(place, GOOD))
    with holding(plan.output), pytest.raises(FloraExportError, match="another fleet is at work"):
        run_fleet(plan, Cluster(), lambda *_: None)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; adapters, of which `mortal` is to kill its workers, and `broken` has no weights; artifacts of two, as `build` makes them."""
    root = tmp_path_factory.mktemp("fleet")
    base = make_speaking_base(root / "base")
    for seed, name in enumerate(("one", "two", "mortal"), 1):
        make_adapter(base, root / "adapters" / name, seed=seed)
    for name in ("one", "two"):
        build(root / "adapters" / name, str(base), root / "built" / name, BuildOptions(), silent)
    shutil.copytree(root / "adapters" / "one", root / "adapters" / "broken")
    (root / "adapters" / "broken" / "adapter_model.safetensors").unlink()
    return root


def run(monkeypatch: pytest.MonkeyPatch, scene: Path, work: Callable[[Task], Outcome], *more: str, **changes: Any) -> Result:
    """The command, its workers at another work."""
    plan = changed(adapters=["adapters/*"], targets={"cpu": {"backend": "onnxruntime"}}) | changes
    monkeypatch.setattr(fleet_run.run_fleet, "__defaults__", (work,))
    return CliRunner().invoke(main, ["fleet", str(write(scene, plan)), "--json", *more])


def in_this_process(monkeypatch: pytest.MonkeyPatch, scene: Path, ran: list[str]) -> None:
    """No Ray: tasks are done here, and noted. What is built is a copy of what was built of the same weights."""

    def outcomes(tasks: list[Task], cluster: Cluster, work: Callable[[Task], Outcome]) -> Any:
        for task in tasks:
            ran.append(f"{'build' if task.built is None else 'publish'} {task.job.name}")
            yield work(task)

    def copied(job: Job) -> Outcome:
        artifact = read[(job.checkpoint / "adapter_model.safetensors").read_bytes()]
        shutil.rmtree(job.output, ignore_errors=True)
        shutil.copytree(artifact, job.output)
        return Outcome(job.name, "built", verified=True, manifest=file_sha256(artifact / MANIFEST))

    read = {(scene / "adapters" / name / "adapter_model.safetensors").read_bytes(): scene / "built" / name for name in ("one", "two")}
    monkeypatch.setattr(fleet_run, "outcomes", outcomes)
    monkeypatch.setattr(worker, "_build", copied)


def ray_starts_here() -> bool:
    """Whether Ray, without anything of ours, starts and does something."""
    program = "import ray; ray.init('local', num_cpus=1, include_dashboard=False); assert ray.get(ray.remote(lambda: 1).remote()) == 1"
    try:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "report.json"}


def test_workers_that_are_killed_lose_nothing_and_one_that_fails_fails_alone(
    monkeypatch: pytest.MonkeyPatch, scene: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    marks = tmp_path / "marks"
    marks.mkdir()
    page = tmp_path / "page.html"
    result = run(monkeypatch, scene, partial(dies, marks), "--workers", "2", "--retries", "1", "--report", str(page))
    if "Ray has not started" in result.stderr or "Ray does not start" in result.stderr:
        assert not ray_starts_here(), result.stderr
        pytest.skip(f"Ray does not start on this machine: {result.stderr}")
    found = {job["job"]: job for job in json.loads(result.stdout)["jobs"]}
    assert {name: (job["state"], job["exit_code"], job["attempts"]) for name, job in found.items()} == {
        "one/cpu": ("built", 0, 1),
        "two/cpu": ("built", 0, 2),
        "mortal/cpu": ("failed", 3, 2),
        "broken/cpu": ("failed", 2, 1),
    }
    assert result.exit_code == 2
    assert "adapter_model.safetensors" in found["broken/cpu"]["message"]
    assert "worker died" in found["mortal/cpu"]["message"]
    assert len(result.stderr.splitlines()) == 4  # nothing of Ray's
    assert len(list(marks.iterdir())) == 3
    out = scene / "out"
    assert {str(path.relative_to(out)) for path in out.glob("[!.]*/*")} == {"one/cpu", "two/cpu"}  # no half of one, `.cpu.building-`
    for name in ("one", "two"):
        artifact = open_artifact(out / name / "cpu")
        assert artifact.manifest.verified
        assert not changed_files(artifact)
        assert files(scene / "built" / name) == files(artifact.path)
    assert files(out / "one" / "cpu") != files(out / "two" / "cpu")
    text = page.read_text()
    assert all(name in text for name in found)
    assert "2 built, 2 failed" in text
    assert os.path.relpath(out / "one" / "cpu" / "report.json", tmp_path) in text

    ran: list[str] = []  # the next run does what is left, and no more
    in_this_process(monkeypatch, scene, ran)
    again = run(monkeypatch, scene, lambda task: Outcome(task.job.name, "failed", exit_code=3, message="here"))
    assert ran == ["build broken/cpu", "build mortal/cpu"]
    states = {job["job"]: job["state"] for job in json.loads(again.stdout)["jobs"]}
    assert states == {"one/cpu": "kept", "two/cpu": "kept", "mortal/cpu": "failed", "broken/cpu": "failed"}


def test_a_machine_of_a_cluster_that_goes_loses_nothing(scene: Path, tmp_path: Path) -> None:
    """Two nodes of Ray, both on this machine, a core each: one is killed, and what it was at is done on the other."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    try:
        nodes = cluster_utils.Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon})
    except Exception as error:
        if ray_starts_here():
            raise
        pytest.skip(f"Ray does not start on this machine: {error}")
    try:
        nodes.add_node(num_cpus=1)
        head = nodes.head_node.node_id
        tasks = [Task(job) for job in read_plan(write(scene, changed(adapters=["adapters/*"]))).jobs]
        marks = tmp_path / "marks"
        marks.mkdir()
        done = list(outcomes(tasks, Cluster(nodes.address), partial(ends_a_machine, marks, head)))
    finally:
        nodes.shutdown()
    assert {outcome.job for outcome in done} == {task.job.name for task in tasks}
    assert {(outcome.state, outcome.message) for outcome in done} == {("built", head)}
    assert sorted(outcome.attempts for outcome in done) == [1, 1, 1, 2]
    assert len(list(marks.iterdir())) == 3


def test_a_driver_that_ends_as_it_starts_is_tried_again_and_one_that_ends_later_is_an_error(tmp_path: Path) -> None:
    """Ray ends its own process with code 1 where it loses its servers, which would be that of a failed verification."""
    with pytest.raises(BackendError, match="ended the fleet's driver"):
        started(ends_unheard, tmp_path, tries=1)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    driver = started(ends_unheard, tmp_path, tries=2)
    try:
        with pytest.raises(BackendError, match=r"ended the fleet's driver \(exit code 1\)"):
            driver.said()
    finally:
        driver.end()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_driver_that_hangs_is_killed() -> None:
    with pytest.raises(BackendError, match="not started within"):
        started(hangs, tries=1, seconds=0.1)


def test_what_has_changed_is_done_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch, scene: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    in_this_process(monkeypatch, scene, ran)
    adapters = {"one": str(scene / "adapters" / "one"), "two": str(tmp_path / "two")}
    shutil.copytree(scene / "adapters" / "two", tmp_path / "two")
    places = {"output": str(tmp_path / "out"), "adapters": adapters}
    serve = {"serve": {"backend": "onnxruntime", "repository": str(tmp_path / "repos" / "{adapter}")}}

    def did(**changes: Any) -> list[str]:
        ran.clear()
        result = run(monkeypatch, scene, do, **(places | {"targets": serve} | changes))
        assert result.exit_code == 0, result.output
        return ran.copy()

    assert did(adapters={"one": adapters["one"]}, targets={"serve": {"backend": "onnxruntime"}}) == ["build one/serve"]
    assert did() == ["publish one/serve", "build two/serve"]
    assert did() == []
    (tmp_path / "repos/two/decoder/config.pbtxt").unlink()  # a first publication that was killed before it was live
    assert did() == ["publish two/serve"]
    version = live(tmp_path / "repos/two")["decoder"]
    shutil.copyfile(tmp_path / "repos/one/decoder/1/manifest.json", tmp_path / f"repos/two/decoder/{version}/manifest.json")  # another's
    assert did() == ["publish two/serve"]
    assert did() == []
    damaged = tmp_path / "repos/two/decoder" / str(live(tmp_path / "repos/two")["decoder"]) / "manifest.json"
    damaged.write_text("{")
    assert did() == ["publish two/serve"]
    shutil.rmtree(tmp_path / "repos/two")
    assert did() == ["publish two/serve"]
    out = tmp_path / "out"
    shutil.copyfile(scene / "adapters" / "one" / "adapter_model.safetensors", tmp_path / "two" / "adapter_model.safetensors")
    assert did() == ["build two/serve"]  # of another adapter
    assert sorted(path.name for path in (tmp_path / "repos/two/decoder").iterdir() if path.is_dir()) == ["1", "2", "warmup"]
    with (out / "one/serve/model.onnx.data").open("r+b") as file:
        file.write(b"damage")
    assert did() == ["build one/serve"]
    shutil.rmtree(out / "one/serve")
    (out / "one/.serve.building-left").mkdir()  # of a build that was killed
    assert did() == ["build one/serve"]
    assert not (out / "one/.serve.building-left").exists()
    (out / ".fleet/one/serve.json").write_text("{")
    assert did() == ["build one/serve"]
    assert [path.name for path in (tmp_path / "repos/one/decoder").iterdir() if path.name.isdecimal()] == ["1"]  # it was live already
    assert did(targets={"serve": serve["serve"] | {"fuse": "forward"}}) == ["build one/serve", "build two/serve"]


def test_the_example_is_a_plan_for_the_adapters_that_it_makes(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "10_fleet"
    copy = tmp_path / "examples" / "10_fleet"
    copy.mkdir(parents=True)
    shutil.copyfile(example / "plan.yaml", copy / "plan.yaml")
    makes = runpy.run_path(str(example / "make_adapters.py"))
    makes["main"](tmp_path / "out" / "fleet")
    plan = read_plan(copy / "plan.yaml")
    assert [job.name for job in plan.jobs] == [f"{name}/{target}" for name in sorted(makes["NAMES"]) for target in ("cpu", "plain")]
    weights = {(job.checkpoint / "adapter_model.safetensors").read_bytes() for job in plan.jobs}
    assert len(weights) == len(makes["NAMES"])
    inputs = inputs_of(plan)
    assert len({each.sha256 for each in inputs.values()}) == len(plan.jobs)
