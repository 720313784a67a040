"""sign, bom and reproduce: who vouches for an artifact, what is in it, and whether it comes from what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flora_export.cli.common import DIRECTORY, base_option, json_option, let_threads_sleep, print_json, progress, run_command

if TYPE_CHECKING:
    from flora_export.trust.signature import Signer

adapters_option = click.option("--ckpt", "ckpts", type=DIRECTORY, multiple=True, help="Adapter that OUT was built from; several in order.")


def signer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whose signature is asked for."""
    by = click.option(
        "--signer-ca", type=DIRECTORY, multiple=True, metavar="PEM", help="Refuse unless a certificate of these has signed OUT."
    )
    return click.option("--signer", type=DIRECTORY, metavar="PEM", help="Refuse unless this public key has signed all files of OUT.")(
        by(command)
    )


def signer_of(signer: Path | None, signer_ca: tuple[Path, ...]) -> Signer | None:
    """Whose signature is asked for; None of nobody's."""
    if signer is None and not signer_ca:
        return None
    from flora_export.trust.signature import Signer

    if signer is not None and signer_ca:
        raise click.UsageError("--signer and --signer-ca exclude each other: a signature is of a key or of a certificate.")
    return Signer(signer, signer_ca)


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--key", type=DIRECTORY, required=True, metavar="PEM", help="Private key: EC on P-256, P-384 or P-521.")
@click.option("--certificate", type=DIRECTORY, metavar="PEM", help="The key's certificate, to be verified with --signer-ca.")
@click.option("--certificate-chain", type=DIRECTORY, multiple=True, metavar="PEM", help="Those between it and its root, or the root.")
@json_option
def sign(out: Path, key: Path, certificate: Path | None, certificate_chain: tuple[Path, ...], as_json: bool) -> None:
    """Sign every file of the artifact OUT: OUT/model.sig, as OpenSSF's model-signing writes and reads it."""
    if (certificate is None) != (not certificate_chain):
        raise click.UsageError("--certificate and --certificate-chain go together.")

    def run() -> int:
        from flora_export.artifact import SIGNATURE
        from flora_export.trust import signature

        signature.sign(out, signature.Key(key, certificate, certificate_chain))
        if as_json:
            print_json({"signed": str(out), "signature": str(out / SIGNATURE)})
        else:
            click.echo(f"wrote {out / SIGNATURE}")
        return 0

    run_command(run, as_json)


@click.command()
@click.argument("out", type=DIRECTORY)
@adapters_option
@click.option("--base", metavar="DIR", help="Base model: a directory or hub name. Without it, the BOM has no licence of the base.")
@json_option
def bom(out: Path, ckpts: tuple[Path, ...], base: str | None, as_json: bool) -> None:
    """Write the CycloneDX ML-BOM of the artifact OUT: OUT/bom.cdx.json. With --base and --ckpt it has the licences of their cards."""

    def run() -> int:
        from flora_export.artifact import open_artifact
        from flora_export.base_model import load_base
        from flora_export.trust.bom import write_bom

        file = write_bom(open_artifact(out), None if base is None else load_base(base), ckpts)
        if as_json:
            print_json({"bom": str(file)})
        else:
            click.echo(f"wrote {file}")
        return 0

    run_command(run, as_json)


@click.command()
@click.argument("out", type=DIRECTORY)
@adapters_option
@base_option
@signer_options
@json_option
def reproduce(
    out: Path, ckpts: tuple[Path, ...], base: str | None, signer: Path | None, signer_ca: tuple[Path, ...], as_json: bool
) -> None:
    """Build OUT again, from the same base and adapters and with the options of its provenance, and compare every byte.

    Exit code 0: the files are the same; 1: some differ, and are named.
    """
    if not ckpts:
        raise click.UsageError("Give --ckpt DIR, the adapter that OUT was built from.")
    wanted = signer_of(signer, signer_ca)

    def run() -> int:
        let_threads_sleep()
        from flora_export import reproduce as reproducing
        from flora_export.trust.signature import check_signature

        if wanted is not None:
            check_signature(out, wanted)
        found = reproducing.reproduce(out, ckpts, base, progress())
        if as_json:
            print_json({"reproduced": not found.differ, "same": found.same, "differ": found.differ, "versions": found.versions})
        else:
            click.echo(found.to_text())
        return 1 if found.differ else 0

    run_command(run, as_json)
