"""rebuild: an engine for the machine that serves."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, progress, run_command
from flora_export.cli.engine_options import given_options, rebuild_options


@click.command()
@click.argument("out", type=DIRECTORY)
@rebuild_options
@json_option
@click.pass_context
def rebuild(context: click.Context, /, out: Path, as_json: bool, **settings: object) -> None:
    """Make the engine or the contexts of OUT anew, for this machine or the chip that is named, from the graph and the plan that OUT holds.

    The new engine replays the golden vectors before it takes the old one's place; if anything fails, OUT stays as it was.
    """

    def run() -> int:
        from flora_export.rebuild import rebuild as make

        artifact, ran = make(out, given_options(context, settings), progress())
        if as_json:
            print_json({"output": str(out), "engine": artifact.manifest.engine, "runtime": ran, "files": artifact.manifest.files})
        else:
            click.echo(f"golden vectors replayed: {ran}\nrebuilt {out}")
        return 0

    run_command(run, as_json)
