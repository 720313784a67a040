"""set-adapter and publish-adapter: another adapter in a bank that is there, without building it anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flora_export.cli.common import (
    DIRECTORY,
    base_option,
    json_option,
    let_threads_sleep,
    print_json,
    progress,
    run_command,
    vacuous_option,
)
from flora_export.cli.quantization_options import loss_option
from flora_export.cli.triton import say_published


def _shared(command: Callable[..., None]) -> Callable[..., Any]:
    command = vacuous_option(loss_option(base_option(command)))
    return click.option("--name", required=True, help="A name that the bank has is given to CKPT; a new one takes an empty slot.")(command)


@click.command("set-adapter")
@click.argument("out", type=DIRECTORY)
@click.argument("ckpt", type=DIRECTORY)
@click.option("--output", type=DIRECTORY, help="Write the bank there, and leave OUT as it is.")
@_shared
@json_option
def set_adapter(
    out: Path,
    ckpt: Path,
    output: Path | None,
    name: str,
    base: str | None,
    max_quantization_loss: float | None,
    allow_vacuous: bool,
    as_json: bool,
) -> None:
    """Put the adapter CKPT into the bank OUT, compared with eager PyTorch as in a build; the others are as they were."""

    def run() -> int:
        let_threads_sleep()
        from flora_export.refill import refill
        from flora_export.verify.parity import VerifyOptions

        options = VerifyOptions(allow_vacuous, max_quantization_loss=max_quantization_loss)
        artifact, report = refill(out, name, ckpt, base, output or out, options, progress(), force=output is None)
        if as_json:
            print_json({"output": str(artifact.path), "verified": report.verified, "report": report.to_dict()})
        else:
            click.echo(report.to_text())
            click.echo(f"wrote {artifact.path}")
        return 0

    run_command(run, as_json)


@click.command("publish-adapter")
@click.argument("repo", type=DIRECTORY)
@click.argument("ckpt", type=DIRECTORY)
@_shared
@json_option
def publish_adapter(
    repo: Path, ckpt: Path, name: str, base: str | None, max_quantization_loss: float | None, allow_vacuous: bool, as_json: bool
) -> None:
    """Put the adapter CKPT into the bank that is live in the Triton model repository REPO: verified, then served as its next version."""

    def run() -> int:
        let_threads_sleep()
        from flora_export import publish as publishing
        from flora_export.verify.parity import VerifyOptions

        options = VerifyOptions(allow_vacuous, max_quantization_loss=max_quantization_loss)
        done = publishing.publish_adapter(repo, name, ckpt, base, options, progress())
        say_published(repo, done, as_json)
        return 0

    run_command(run, as_json)
