"""fleet: many adapters for many targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flora_export.cli.common import DIRECTORY, json_option, let_threads_sleep, one_line, print_json, run_command

if TYPE_CHECKING:
    from flora_export.fleet.state import Outcome


@click.command()
@click.argument("plan", type=DIRECTORY)
@click.option("--output", type=DIRECTORY, metavar="DIR", help="Where artifacts go, DIR/ADAPTER/TARGET, instead of where the plan says.")
@click.option("--address", metavar="ADDR", help="A Ray cluster that shares the plan's directories. Without it, Ray is started here.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Jobs at a time. Without it, as many as there are cores.")
@click.option(
    "--retries", type=click.IntRange(min=0), default=2, show_default=True, help="How often a job is given to another worker when one dies."
)
@click.option("--report", type=DIRECTORY, metavar="FILE", help="Write a page of all jobs.")
@json_option
def fleet(
    plan: Path, output: Path | None, address: str | None, workers: int | None, retries: int, report: Path | None, as_json: bool
) -> None:
    """Build, verify and publish what PLAN names, and what is not there yet.

    Exit code: 0 where all is verified; 1 where an artifact failed its verification; else 2 where an input is wrong; else 3, where only the
    machine has failed and the same command may do the rest.
    """

    def run() -> int:
        let_threads_sleep()
        from flora_export.artifact import writing
        from flora_export.fleet.engine import Cluster
        from flora_export.fleet.plan import read_plan
        from flora_export.fleet.run import run_fleet

        done = run_fleet(read_plan(plan, output), Cluster(address, workers, retries), _say)
        if report is not None:
            from flora_export.fleet.page import fleet_page

            with writing(report):
                report.write_text(fleet_page(done, report), encoding="utf-8")
        if as_json:
            print_json(done.to_dict())
        else:
            counts = ", ".join(f"{count} {state}" for state, count in sorted(done.counts.items()))
            click.echo(f"{len(done.outcomes)} jobs in {done.seconds:.0f} s: {counts}; artifacts in {done.plan.output}")
        return done.exit_code

    run_command(run, as_json)


def _say(outcome: Outcome, done: int, of: int) -> None:
    about = f"{outcome.seconds:.1f} s" + (f", attempt {outcome.attempts}" if outcome.attempts > 1 else "")
    if outcome.failed:
        what = f"failed with {outcome.exit_code}, {about}: {outcome.message}"
    else:
        what = "kept, as it was" if outcome.state == "kept" else f"{outcome.state}, {about}"
        what += f", version {outcome.version}" if outcome.version is not None else ""
        what += "" if outcome.verified else ", not verified"
    click.echo(one_line(f"[{done}/{of}] {outcome.job}: {what}"), err=True)
