"""explain: where each adapter tensor is."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.branch import FUSE_LEVELS
from flora_export.cli.common import DIRECTORY, base_option, json_option, print_json, progress, run_command


@click.command()
@click.argument("ckpt_or_out", type=DIRECTORY)
@base_option
@click.option("--fuse", type=click.Choice(FUSE_LEVELS), default="both", show_default=True, help="Of a checkpoint: the level to plan for.")
@json_option
def explain(ckpt_or_out: Path, base: str | None, fuse: str, as_json: bool) -> None:
    """Show where each adapter tensor is: the ledger of an artifact, checked bit for bit, or the plan for a checkpoint."""

    def run() -> int:
        from flora_export import pipeline
        from flora_export.explain import ledger_dict, ledger_text

        blocks, operators, entries, report = pipeline.explain(ckpt_or_out, base, fuse, progress())
        if as_json:
            print_json(ledger_dict(blocks, operators, entries, report))
        else:
            click.echo(ledger_text(blocks, operators, report))
        return 1 if report is not None and report.faults else 0

    run_command(run, as_json)
