"""verify: check an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.cli.common import (
    DIRECTORY,
    adapter_option,
    base_option,
    json_option,
    let_threads_sleep,
    print_json,
    printable,
    progress,
    quick_option,
    run_command,
    vacuous_option,
    weighted_adapters,
)
from flora_export.cli.quantization_options import loss_option
from flora_export.cli.trust import signer_of, signer_options


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option(
    "--ckpt",
    "ckpts",
    type=DIRECTORY,
    multiple=True,
    help="Adapter to compare with, once for each of a bank's, in order. Without it, the recorded golden vectors are replayed.",
)
@adapter_option
@base_option
@quick_option
@vacuous_option
@click.option("--prompts", type=DIRECTORY, help="Compare on the prompts of this file, one a line, instead of those that ship.")
@loss_option
@click.option("--localise", is_flag=True, help="Name the first stage, layer and tensor that diverges; done anyway where the numbers fail.")
@click.option("--report", type=DIRECTORY, metavar="FILE", help="Write the report: a page where the name ends in .html, else JSON.")
@click.option("--markdown", type=DIRECTORY, metavar="FILE", help="Write a short comment for a pull request.")
@click.option("--junit", type=DIRECTORY, metavar="FILE", help="Write test cases as JUnit XML.")
@signer_options
@json_option
def verify(
    out: Path,
    ckpts: tuple[Path, ...],
    adapters: tuple[str, ...],
    base: str | None,
    quick: bool,
    allow_vacuous: bool,
    prompts: Path | None,
    max_quantization_loss: float | None,
    localise: bool,
    report: Path | None,
    markdown: Path | None,
    junit: Path | None,
    signer: Path | None,
    signer_ca: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Verify the artifact OUT: its signature where one is asked for, its bytes, and its numbers against eager PyTorch."""
    wanted = signer_of(signer, signer_ca)

    def run() -> int:
        let_threads_sleep()
        from flora_export import pipeline
        from flora_export.artifact import open_artifact
        from flora_export.verify.formats import write_reports
        from flora_export.verify.parity import VerifyOptions

        if base is not None and not ckpts:
            raise click.UsageError("--base needs --ckpt: the base model alone proves nothing of the adapter.")
        if quick and not ckpts:
            raise click.UsageError("--quick needs --ckpt: golden vectors are all replayed.")
        if adapters and not ckpts:
            raise click.UsageError("--adapter needs --ckpt: it is added to that.")
        if wanted is not None:  # before anything else of OUT is read
            from flora_export.trust.signature import check_signature

            check_signature(out, wanted)
        first, weighted = weighted_adapters(ckpts[0], adapters) if ckpts else (None, ())
        options = VerifyOptions(
            allow_vacuous,
            prompts,
            quick=quick,
            localise=localise,
            max_quantization_loss=max_quantization_loss,
            weighted=weighted,
            others=ckpts[1:],
        )
        found = pipeline.verify(out, first, base, options, progress())
        write_reports(found, open_artifact(out), report, markdown, junit)
        if as_json:
            print_json(found.to_dict())
        else:
            click.echo(printable(found.to_text()))
        return 0 if found.verified else 1

    run_command(run, as_json)
