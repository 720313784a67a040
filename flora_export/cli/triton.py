"""triton: publish an artifact in a Triton model repository, roll back, check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, progress, run_command
from flora_export.cli.trust import signer_of, signer_options

if TYPE_CHECKING:
    from flora_export.publish import Published

KEPT = "as REPO is served; at first {}"


@click.command()
@click.argument("paths", type=DIRECTORY, nargs=-1, required=True, metavar="[OUT] REPO")
@click.option("--instances", type=click.IntRange(min=1), show_default=KEPT.format(1), help="Copies of each model that the server loads.")
@click.option("--max-batch", type=click.IntRange(min=1), show_default=KEPT.format(8), help="Requests that `decoder` joins at most.")
@click.option("--concurrent", type=click.IntRange(min=1), show_default=KEPT.format(8), help="Requests that a `generate` works on at once.")
@click.option(
    "--threads", type=click.IntRange(min=0), show_default=KEPT.format(0), help="Threads of one operator; 0: the runtime's choice."
)
@click.option("--max-queue", type=click.IntRange(min=1), show_default=KEPT.format(256), help="Requests that wait; more are refused.")
@click.option("--max-tokens", type=click.IntRange(min=0), show_default=KEPT.format(0), help="Most a request may ask for; 0: the context's.")
@click.option("--max-prompt", type=click.IntRange(min=0), show_default=KEPT.format(0), help="Most tokens of a prompt; 0: the context's.")
@click.option(
    "--check-files/--no-check-files",
    default=None,
    show_default=KEPT.format("check"),
    help="Check hashes whenever `generate` is loaded.",
)
@click.option("--rollback", is_flag=True, help="Make the version live again that was live before; takes REPO alone.")
@click.option("--to", type=click.IntRange(min=1), metavar="N", help="Make version N live; takes REPO alone.")
@click.option("--check", is_flag=True, help="Check configurations and files without a server; takes REPO alone.")
@signer_options
@json_option
def triton(
    paths: tuple[Path, ...],
    rollback: bool,
    to: int | None,
    check: bool,
    signer: Path | None,
    signer_ca: tuple[Path, ...],
    as_json: bool,
    **serving: Any,  # a field of Serving each; None where the option is not given
) -> None:
    """Publish the artifact OUT as the next version in the Triton model repository REPO. It goes live once its golden vectors replay."""
    action = rollback or to is not None or check
    if rollback + (to is not None) + check > 1:
        raise click.UsageError("--rollback, --to and --check exclude each other.")
    if len(paths) != (1 if action else 2):
        raise click.UsageError("--rollback, --to and --check take REPO alone." if action else "Give OUT and REPO.")
    repo, wanted = paths[-1], signer_of(signer, signer_ca)
    if wanted is not None and action:
        raise click.UsageError("--signer and --signer-ca are for publishing OUT: versions in REPO hold no signature.")

    def run() -> int:
        from flora_export import publish as publishing
        from flora_export.artifact import open_artifact
        from flora_export.backends.triton import repository
        from flora_export.backends.triton.config import read_serving

        if check:
            live, faults = repository.live(repo), repository.check(repo)
            if as_json:
                print_json({"live": live, "faults": faults})
            else:
                click.echo(
                    "\n".join([f"{model}: version {version} is live" for model, version in live.items()] + (faults or ["no faults"]))
                )
            return 1 if faults else 0
        if action:
            done = publishing.roll_back(repo, to)
        else:
            served = replace(read_serving(repo), **{name: value for name, value in serving.items() if value is not None})
            if wanted is not None:
                done = publishing.publish_signed(paths[0], wanted, repo, served, progress())
            else:
                done = publishing.publish(open_artifact(paths[0]), repo, served, progress())
        say_published(repo, done, as_json)
        return 0

    run_command(run, as_json)


def say_published(repo: Path, done: Published, as_json: bool) -> None:
    if as_json:
        print_json({"repository": str(repo), "version": done.version, "former": done.former, "models": done.models})
    else:
        before = f" (before: version {done.former})" if done.former is not None else ""
        click.echo(f"{repo}: version {done.version} is live{before}: {', '.join(done.models)}")
