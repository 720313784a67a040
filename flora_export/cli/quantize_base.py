"""quantize-base: a base model to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, progress, run_command
from flora_export.cli.quantization_options import base_quantization_options


@click.command("quantize-base")
@click.argument("base")
@click.option("--precision", type=click.Choice(["int8", "int4"]), required=True)
@click.option("--output", type=DIRECTORY, required=True, help="Directory to make. Refused where it exists.")
@base_quantization_options
@json_option
def quantize_base(base: str, precision: str, output: Path, as_json: bool, **settings: Any) -> None:
    """Write the base model BASE with its weights rounded as a build rounds them: a plain checkpoint, to train an adapter on.

    Build that adapter with the same options and --base OUTPUT, and its quantized artifact has the very weights that it was trained on.
    """

    def run() -> int:
        from flora_export.backends.quantizing import choose_quantization, read_options
        from flora_export.quantized_base import quantize_base as write

        quantization = choose_quantization(precision, "cpu", read_options(settings))
        assert quantization is not None
        done = write(base, output, quantization, progress())
        if as_json:
            print_json({"output": str(output), "tensors": done.tensors, "moved": done.moved})
        else:
            click.echo(f"wrote {output}: {done.tensors} weights rounded to {precision}, which moves them by {done.moved:.2%} of their norm")
        return 0

    run_command(run, as_json)
