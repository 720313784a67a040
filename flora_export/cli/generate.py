"""generate: an artifact answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, run_command
from flora_export.errors import ArtifactError


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME", help="Of a bank: who answers, once for all or for each PROMPT; base: none."
)
@click.option("--without-adapter", is_flag=True, help="Silence the adapter, to see the base model's answer.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "genai", "decoder"]),
    default="auto",
    show_default=True,
    help="ONNX Runtime GenAI, or our own loop around the backend; auto: GenAI where it can run OUT.",
)
@json_option
def generate(
    out: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    adapters: tuple[str, ...],
    without_adapter: bool,
    raw: bool,
    runtime: str,
    as_json: bool,
) -> None:
    """Let the artifact OUT answer PROMPT, decoded greedily; several prompts are one batch."""
    if adapters and without_adapter:
        raise click.UsageError("--adapter chooses an adapter, and --without-adapter takes none: give one of the two")

    def run() -> int:
        from flora_export.artifact import changed_files, open_artifact
        from flora_export.generate import generate as answer

        artifact = open_artifact(out)
        if faults := changed_files(artifact):
            raise ArtifactError(f"{out} is damaged: {'; '.join(faults)}. Build it again.")
        streamed = len(prompts) == 1 and not as_json
        answers = answer(
            artifact,
            prompts,
            max_new_tokens=max_new_tokens,
            adapter=not without_adapter,
            adapters=adapters,
            chat=not raw,
            runtime=runtime,
            on_text=(lambda text: click.echo(text, nl=False)) if streamed else None,
        )
        if as_json:
            print_json({"adapter": not without_adapter, "answers": [dataclasses.asdict(a) for a in answers]})
        elif streamed:
            click.echo()
        else:
            click.echo("\n---\n".join(a.text for a in answers))
        a = answers[0]
        click.echo(
            f"{a.prompt_tokens} prompt tokens, {a.new_tokens} new; first after {a.time_to_first_token * 1000:.0f} ms, "
            f"then {a.time_per_output_token * 1000:.1f} ms each (runtime {a.runtime})",
            err=True,
        )
        return 0

    run_command(run, as_json)
