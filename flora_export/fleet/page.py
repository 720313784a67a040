"""The report page of a fleet: one self-contained file, a row for each job, what has failed first."""

from __future__ import annotations

import os
from pathlib import Path

from flora_export.artifact import REPORT
from flora_export.fleet.run import Fleet
from flora_export.verify.html import escaped, page, table

HEAD = ("job", "state", "verified", "logits / allowed", "effect / allowed", "MB", "seconds", "attempts", "Triton version", "exit code")


def fleet_page(fleet: Fleet, file: Path) -> str:
    """The page, as it lies in `file`: links are relative to it."""
    counts = ", ".join(f"{count} {state}" for state, count in sorted(fleet.counts.items()))
    title = f"flora-export: fleet of {len(fleet.outcomes)}: {counts}"
    kind = "good" if fleet.verified else "bad" if fleet.exit_code else "unsure"
    total = f"{fleet.seconds:.0f} s, exit code {fleet.exit_code}; base {fleet.plan.base}; in {fleet.plan.output}"
    failed = [outcome for outcome in fleet.outcomes if outcome.failed]
    causes = "".join(f"<p>{escaped(f'{outcome.job}: {outcome.message}'[:600])}</p>" for outcome in failed[:50])
    rows, links = [], []
    for job, outcome in sorted(zip(fleet.plan.jobs, fleet.outcomes, strict=True), key=lambda pair: (not pair[1].failed, pair[1].job)):
        shares = [f"{share:.1%}" if share is not None else "-" for share in (outcome.parity, outcome.effect)]
        verified = "yes" if outcome.verified and not outcome.failed else "no"
        about = [outcome.state, verified, *shares, f"{outcome.bytes / 1e6:.1f}", f"{outcome.seconds:.1f}", str(outcome.attempts)]
        rows.append([outcome.job, *about, str(outcome.version or "-"), str(outcome.exit_code)])
        report = job.output / REPORT
        links.append(os.path.relpath(report if report.is_file() else job.output, file.absolute().parent))
    return page(
        title,
        [
            f'<p class="muted">{escaped(total)}</p><div class="verdict {kind}"><h1>{escaped(counts)}</h1>{causes}</div>',
            "<p>Logits and effect: the largest share that was used of what verification allows.</p>",
            table(HEAD, rows, links),
        ],
    )
