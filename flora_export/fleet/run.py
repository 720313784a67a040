"""run_fleet(): the story on one screen. What is done is kept, the rest goes to workers, and what they do is written down."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from flora_export.fleet.engine import Cluster, outcomes
from flora_export.fleet.plan import Plan
from flora_export.fleet.state import Outcome, clear, holding, inputs_of, kept, write_record
from flora_export.fleet.worker import Task, Work, do

GRAVEST = (1, 2, 3)  # an artifact that computes something else; a wrong input; last a machine, where the same once more may do


@dataclass(frozen=True)
class Fleet:
    """What became of a plan: an outcome for each of its jobs, in its order."""

    plan: Plan
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where nothing has failed; else the gravest code of what has, and 3 where nothing but the machine is to blame."""
        codes = {outcome.exit_code for outcome in self.outcomes}
        return next((code for code in GRAVEST if code in codes), 0)

    @property
    def verified(self) -> bool:
        return all(outcome.verified and not outcome.failed for outcome in self.outcomes)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(outcome.state for outcome in self.outcomes))

    def to_dict(self) -> dict[str, Any]:
        pairs = zip(self.plan.jobs, self.outcomes, strict=True)
        jobs = [dataclasses.asdict(outcome) | {"output": str(job.output)} for job, outcome in pairs]
        facts = {"output": str(self.plan.output), "verified": self.verified, "exit_code": self.exit_code, "seconds": self.seconds}
        return facts | {"counts": self.counts, "jobs": jobs}


def run_fleet(plan: Plan, cluster: Cluster, finished: Callable[[Outcome, int, int], None], work: Work = do) -> Fleet:
    """Build, verify and publish what a plan names and what is not there yet. `finished(outcome, done, of)` hears of each job.

    However it ends, each artifact is absent or whole, and the next run does what is left.

    Raises:
        FloraExportError: nothing could be begun: another fleet is at work there, there is no such base model, or Ray does not start.
            What fails of a job is in its outcome.
    """
    began, jobs = time.perf_counter(), {job.name: job for job in plan.jobs}
    found: dict[str, Outcome] = {}

    def note(outcome: Outcome) -> None:
        found[outcome.job] = outcome
        finished(outcome, len(found), len(jobs))

    with holding(plan.output):
        clear(plan)
        inputs, tasks = inputs_of(plan), list[Task]()
        for job in plan.jobs:
            former, published = kept(plan, job, inputs[job.name])
            if former is not None and published:
                note(former)
            else:
                tasks.append(Task(job, former))
        if tasks:
            try:
                with closing(outcomes(tasks, cluster, work)) as coming:
                    for outcome in coming:
                        if outcome.manifest:
                            write_record(plan, jobs[outcome.job], inputs[outcome.job], outcome)
                        note(outcome)
            finally:
                clear(plan)
    return Fleet(plan, tuple(found[name] for name in jobs), round(time.perf_counter() - began, 3))
