"""rebuild: an engine for the machine that serves."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, progress, run_command
from flora_export.cli.engine_options import capability_option, engine_cache_option, flavour_option


@click.command()
@click.argument("out", type=DIRECTORY)
@flavour_option
@capability_option
@engine_cache_option
@json_option
def rebuild(out: Path, trt_flavor: str, compute_capability: str | None, engine_cache: bool, as_json: bool) -> None:
    """Make the TensorRT engine of OUT anew, for this machine's GPU and TensorRT, from the graph and the plan that OUT holds.

    The new engine replays the golden vectors before it takes the old one's place; if anything fails, OUT stays as it was.
    """

    def run() -> int:
        from flora_export.rebuild import rebuild as make

        given = {"trt_flavor": trt_flavor, "compute_capability": compute_capability, "engine_cache": engine_cache}
        artifact, ran = make(out, given, progress())
        if as_json:
            print_json({"output": str(out), "engine": artifact.manifest.engine, "runtime": ran, "files": artifact.manifest.files})
        else:
            click.echo(f"golden vectors replayed: {ran}\nrebuilt {out}")
        return 0

    run_command(run, as_json)
