"""explain: where each adapter tensor is."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.branch import FUSE_LEVELS
from flora_export.cli.common import DIRECTORY, base_option, json_option, merge_option, print_json, printable, progress, run_command


@click.command()
@click.argument("ckpt_or_out", type=DIRECTORY)
@base_option
@click.option("--fuse", type=click.Choice(FUSE_LEVELS), default="both", show_default=True, help="Of a checkpoint: the level to plan for.")
@merge_option
@click.option(
    "--lint",
    is_flag=True,
    help="Name what TensorRT, or what compiled OUT, would refuse, drop or get wrong in the graph, instead; exit code 1 if any.",
)
@json_option
def explain(ckpt_or_out: Path, base: str | None, fuse: str, merge: bool, lint: bool, as_json: bool) -> None:
    """Show where each adapter tensor is: the ledger of an artifact, checked bit for bit, or the plan for a checkpoint."""

    def run() -> int:
        from flora_export import pipeline

        if lint:
            found = pipeline.lint(ckpt_or_out, base, fuse, "tensorrt", progress())
            if as_json:
                print_json({"ok": not found, "lint": found})
            else:
                click.echo("\n".join(found) or "what compiles this graph takes it: nothing in it is refused, dropped or read another way")
            return 1 if found else 0
        explained = pipeline.explain(ckpt_or_out, base, fuse, progress(), merge=merge)
        if as_json:
            print_json(explained.to_dict())
        else:
            click.echo(printable(explained.to_text()))
        return 1 if explained.faults else 0

    run_command(run, as_json)
