"""inspect: what an adapter is."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, base_option, json_option, print_json, printable, run_command


@click.command()
@click.argument("ckpt", type=DIRECTORY)
@base_option
@json_option
def inspect(ckpt: Path, base: str | None, as_json: bool) -> None:
    """Say what the adapter CKPT is and what a build would do with it, or why it is refused.

    The base model is not loaded; one that is quantized is unpacked.
    """

    def run() -> int:
        from flora_export.inspection import inspect as look

        found = look(ckpt, base)
        if as_json:
            print_json(found.to_dict())
        else:
            click.echo(printable(found.to_text()))
        return 0

    run_command(run, as_json)
