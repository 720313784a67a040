"""What a worker does: one job at a time, by the same functions as `flora-export build` and `flora-export triton`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flora_export.artifact import MANIFEST, Artifact, open_artifact
from flora_export.base_model import file_sha256
from flora_export.errors import FloraExportError
from flora_export.fleet.plan import Job
from flora_export.fleet.state import Outcome


@dataclass(frozen=True)
class Task:
    """A job that is not done. `built`: what became of it before, where its artifact is right and only the publishing is to be done."""

    job: Job
    built: Outcome | None = None


Work = Callable[[Task], Outcome]


def do(task: Task) -> Outcome:
    """Build, verify and publish. What fails fails in the outcome, with the exit code that the command would have."""
    job, began = task.job, time.perf_counter()
    outcome = task.built or Outcome(job.name, "failed")
    try:
        outcome = _build(job) if task.built is None else replace(outcome, state="published", version=None)
        if job.repository is not None:
            outcome = replace(outcome, version=_publish(open_artifact(job.output), job.repository))
    except FloraExportError as error:
        outcome = replace(outcome, state="failed", exit_code=error.exit_code, error=type(error).__name__, message=str(error))
    except Exception as error:  # of libraries, the file system or memory: it is this job's alone
        message = f"{type(error).__name__}: {error}"
        outcome = replace(outcome, state="failed", exit_code=3, error=type(error).__name__, message=message)
    return replace(outcome, seconds=round(time.perf_counter() - began, 3))


def _build(job: Job) -> Outcome:
    from flora_export.backends.triton.config import parse
    from flora_export.pipeline import BuildOptions, build

    if job.repository is not None:
        parse("")  # what publishing needs is asked for before the work
    artifact, report = build(job.checkpoint, job.base, job.output, BuildOptions(**job.options, force=True), _silent)
    numerics, files = report.numerics, artifact.manifest.files.values()
    cases = [] if numerics is None else numerics.cases
    return Outcome(
        job.name,
        "built",
        verified=report.verified,
        parity=max((case.logits_error / numerics.allowed_logits(case) for case in cases), default=None) if numerics else None,
        effect=max((case.effect_error / numerics.allowed_effect(case) for case in cases), default=None) if numerics else None,
        bytes=sum(int(file["bytes"]) for file in files),
        manifest=file_sha256(artifact.path / MANIFEST),
    )


def _publish(artifact: Artifact, repo: Path) -> int:
    """The artifact's version in the repository. One that is live already, of a fleet that was killed before it said so, is that."""
    from flora_export.backends.triton.config import CONFIG, DECODER, read_serving
    from flora_export.backends.triton.repository import check, live
    from flora_export.publish import publish

    if (repo / DECODER / CONFIG).is_file() and not check(repo):  # else a kill has left a part of one, which the next version clears up
        version = live(repo)[DECODER]
        if file_sha256(repo / DECODER / str(version) / MANIFEST) == file_sha256(artifact.path / MANIFEST):
            return version
    repo.parent.mkdir(parents=True, exist_ok=True)
    return publish(artifact, repo, read_serving(repo), _silent).version


def _silent(what: str, done: int, of: int) -> None:
    """A fleet says one line a job."""
