"""convert: an adapter in another form becomes one that is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, run_command


@click.command()
@click.argument("src", type=DIRECTORY)
@click.argument("out", type=DIRECTORY)
@click.option("--alpha", type=float, help="The adapter's alpha, for LoRA², which saves none.")
@click.option("--base", metavar="DIR", help="Base model to name in the configuration, where SRC names none.")
@json_option
def convert(src: Path, out: Path, alpha: float | None, base: str | None, as_json: bool) -> None:
    """Write the adapter SRC, a pickle or a format of its authors' own (ResLoRA, LoRA²), as safetensors and adapter_config.json into OUT.

    None of a pickle's code is run. OUT must not exist yet; it appears whole, or not at all.
    """

    def run() -> int:
        from flora_export.convert import convert as make

        made = make(src, out, alpha, base)
        if as_json:
            print_json(dataclasses.asdict(made))
        else:
            left = f"; {made.left_out} tensors of the base model were left out" if made.left_out else ""
            click.echo(f"{made.method}, {made.tensors} tensors{left}\nwrote {out}")
        return 0

    run_command(run, as_json)
