"""build: from an adapter to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flora_export.backends import BACKENDS, PUBLISHED, load_backend
from flora_export.branch import FUSE_LEVELS
from flora_export.cli.common import (
    DIRECTORY,
    adapter_option,
    bank_of,
    bank_options,
    base_option,
    json_option,
    let_threads_sleep,
    merge_option,
    print_json,
    progress,
    quick_option,
    run_command,
    vacuous_option,
    weighted_adapters,
)
from flora_export.cli.engine_options import engine_options, given_options
from flora_export.cli.quantization_options import loss_option, quantization_options

if TYPE_CHECKING:
    from flora_export.pipeline import BuildOptions


@click.command()
@click.argument("ckpts", metavar="CKPT...", nargs=-1, required=True, type=DIRECTORY)
@click.option("--backend", type=click.Choice([*BACKENDS, *PUBLISHED]), required=True, help="Runtime to build for.")
@base_option
@click.option("--output", type=DIRECTORY, required=True, help="Directory to make. Refused where it exists.")
@click.option(
    "--target", type=click.Choice(["cpu", "cuda", "gpu", "npu"]), help="Machine to build for. Without it, the first that the backend knows."
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), default="fp32", show_default=True)
@click.option("--fuse", type=click.Choice(FUSE_LEVELS), default="both", show_default=True, help="How far adapter branches are fused.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with eager PyTorch; a build that fails leaves no output."
)
@quick_option
@vacuous_option
@adapter_option
@merge_option
@bank_options
@click.option("--align", type=click.IntRange(min=1), metavar="N", help="Pad ranks with zeros to a multiple of N; else as the target likes.")
@quantization_options
@loss_option
@engine_options
@click.option("--sign", type=DIRECTORY, metavar="PEM", help="Sign the output with this private key, as `sign` does: it appears signed.")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@click.option(
    "--dry-run", is_flag=True, help="Write nothing; say what would be refused, and what it would take here: memory, disk, seconds."
)
@json_option
@click.pass_context
def build(
    context: click.Context,
    /,
    ckpts: tuple[Path, ...],
    backend: str,
    base: str | None,
    output: Path,
    target: str | None,
    precision: str,
    fuse: str,
    verify: bool,
    quick: bool,
    allow_vacuous: bool,
    adapters: tuple[str, ...],
    merge: bool,
    names: tuple[str, ...],
    layout: str | None,
    slots: int | None,
    align: int | None,
    max_quantization_loss: float | None,
    sign: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: object,
) -> None:
    """Build an artifact from the adapter CKPT; from several, a bank, of which each request chooses its own."""
    if sign is not None and backend in PUBLISHED:
        raise click.UsageError(f"--backend {backend} leaves nothing to sign: build, sign, and publish with `triton OUT REPO --signer`.")
    if dry_run and backend in PUBLISHED:
        raise click.UsageError(
            f"--dry-run tells of an artifact: ask for --backend {PUBLISHED[backend]}, which is what {backend} publishes."
        )

    def run() -> int:
        let_threads_sleep()
        from flora_export import pipeline
        from flora_export.trust.signature import Key

        own = load_backend(PUBLISHED.get(backend, backend)).options(given_options(context, settings))
        bank = bank_of(ckpts, names, layout, slots, adapters)
        first, weighted = (ckpts[0], ()) if bank is not None else weighted_adapters(ckpts[0], adapters)
        key = None if sign is None else Key(sign)
        options = pipeline.BuildOptions(
            backend,
            target,
            precision,
            fuse,
            verify,
            allow_vacuous,
            force,
            merge,
            align,
            max_quantization_loss,
            weighted,
            bank,
            own,
            quick,
            key,
        )
        if dry_run:
            return _say_forecast(first, base, output, options, as_json)
        if backend in PUBLISHED:
            from flora_export.publish import build_and_publish

            artifact, report = build_and_publish(first, base, output, options, progress())
        else:
            artifact, report = pipeline.build(first, base, output, options, progress())
        if as_json:
            manifest = artifact.manifest
            result = {"output": str(output), "verified": report.verified, "files": manifest.files}
            result |= {key: getattr(manifest, key) for key in ("backend", "target", "precision", "fuse", "padding", "versions")}
            print_json(result | {"report": report.to_dict()})
        else:
            click.echo(report.to_text())
            click.echo(f"wrote {output}")
        return 0

    run_command(run, as_json)


def _say_forecast(ckpt: Path, base: str | None, output: Path, options: BuildOptions, as_json: bool) -> int:
    """A build that is not possible here is the machine's fault: 3."""
    from flora_export.forecast import forecast

    told = forecast(ckpt, base, output, options, progress())
    if as_json:
        print_json(told.to_dict())
    else:
        click.echo(told.to_text())
    return 3 if told.causes else 0
