"""The command line. Click, and nothing else: each command calls one function and prints what it returns.

Exit codes: 0 done and verified; 1 verification failed; 2 wrong use or bad input; 3 a backend or tool is missing or failed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flora_export import __version__
from flora_export.backends import BACKENDS, PLANNED
from flora_export.branch import FUSE_LEVELS
from flora_export.errors import FloraExportError

DIRECTORY = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
base_option = click.option("--base", metavar="DIR", help="Base model: a directory or hub name. Without it, the one that the adapter names.")
vacuous_option = click.option(
    "--allow-vacuous", is_flag=True, help="Accept an adapter with no effect of its own, such as an untrained one."
)


@click.group()
@click.version_option(__version__)
def main() -> None:
    """From an FFBA checkpoint to a fused, verified inference artifact."""


@main.command()
@click.argument("ckpt", type=DIRECTORY)
@click.option("--backend", type=click.Choice([*BACKENDS, *PLANNED]), required=True, help="Runtime to build for.")
@base_option
@click.option("--output", type=DIRECTORY, required=True, help="Directory to make. Refused where it exists.")
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Machine to build for.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--fuse", type=click.Choice(FUSE_LEVELS), default="both", show_default=True, help="How far adapter branches are fused.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with eager PyTorch; a build that fails leaves no output."
)
@vacuous_option
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@json_option
def build(
    ckpt: Path,
    backend: str,
    base: str | None,
    output: Path,
    target: str,
    precision: str,
    fuse: str,
    verify: bool,
    allow_vacuous: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build an artifact from the adapter CKPT."""

    def run() -> int:
        from flora_export import pipeline

        options = pipeline.BuildOptions(backend, target, precision, fuse, verify, allow_vacuous, force)
        artifact, report = pipeline.build(ckpt, base, output, options, _progress())
        if as_json:
            manifest = artifact.manifest
            result = {"output": str(output), "verified": report.verified, "files": manifest.files}
            result |= {key: getattr(manifest, key) for key in ("backend", "target", "precision", "fuse", "padding", "versions")}
            _print_json(result | {"report": report.to_dict()})
        else:
            click.echo(report.to_text())
            click.echo(f"wrote {output}")
        return 0

    _run(run, as_json)


@main.command()
@click.argument("out", type=DIRECTORY)
@click.option("--ckpt", type=DIRECTORY, help="Adapter to compare with. Without it, the recorded golden vectors are replayed.")
@base_option
@vacuous_option
@click.option("--prompts", type=DIRECTORY, help="Compare on the prompts of this file, one a line, instead of those that ship.")
@click.option("--localise", is_flag=True, help="Name the first stage, layer and tensor that diverges; done anyway where the numbers fail.")
@click.option("--report", type=DIRECTORY, metavar="FILE", help="Write the report: a page where the name ends in .html, else JSON.")
@click.option("--markdown", type=DIRECTORY, metavar="FILE", help="Write a short comment for a pull request.")
@click.option("--junit", type=DIRECTORY, metavar="FILE", help="Write test cases as JUnit XML.")
@json_option
def verify(
    out: Path,
    ckpt: Path | None,
    base: str | None,
    allow_vacuous: bool,
    prompts: Path | None,
    localise: bool,
    report: Path | None,
    markdown: Path | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Verify the artifact OUT: its bytes, and its numbers against eager PyTorch."""

    def run() -> int:
        from flora_export import pipeline
        from flora_export.artifact import open_artifact
        from flora_export.verify.formats import write_reports

        if base is not None and ckpt is None:
            raise click.UsageError("--base needs --ckpt: the base model alone proves nothing of the adapter.")
        options = pipeline.VerifyOptions(allow_vacuous, prompts, localise=localise)
        found = pipeline.verify(out, ckpt, base, options, _progress())
        write_reports(found, open_artifact(out), report, markdown, junit)
        if as_json:
            _print_json(found.to_dict())
        else:
            click.echo(found.to_text())
        return 0 if found.verified else 1

    _run(run, as_json)


@main.command()
@click.argument("ckpt_or_out", type=DIRECTORY)
@base_option
@click.option("--fuse", type=click.Choice(FUSE_LEVELS), default="both", show_default=True, help="Of a checkpoint: the level to plan for.")
@json_option
def explain(ckpt_or_out: Path, base: str | None, fuse: str, as_json: bool) -> None:
    """Show where each adapter tensor is: the ledger of an artifact, checked bit for bit, or the plan for a checkpoint."""

    def run() -> int:
        from flora_export import pipeline
        from flora_export.explain import ledger_dict, ledger_text

        blocks, operators, entries, report = pipeline.explain(ckpt_or_out, base, fuse, _progress())
        if as_json:
            _print_json(ledger_dict(blocks, operators, entries, report))
        else:
            click.echo(ledger_text(blocks, operators, report))
        return 1 if report is not None and report.faults else 0

    _run(run, as_json)


@main.command()
@click.argument("out", type=DIRECTORY)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--without-adapter", is_flag=True, help="Silence the adapter, to see the base model's answer.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@json_option
def generate(out: Path, prompts: tuple[str, ...], max_new_tokens: int, without_adapter: bool, raw: bool, as_json: bool) -> None:
    """Let the artifact OUT answer PROMPT, decoded greedily; several prompts are one batch."""

    def run() -> int:
        from flora_export.artifact import open_artifact
        from flora_export.generate import generate as answer

        streamed = len(prompts) == 1 and not as_json
        answers = answer(
            open_artifact(out),
            prompts,
            max_new_tokens=max_new_tokens,
            adapter=not without_adapter,
            chat=not raw,
            on_text=(lambda text: click.echo(text, nl=False)) if streamed else None,
        )
        if as_json:
            _print_json({"adapter": not without_adapter, "answers": [dataclasses.asdict(a) for a in answers]})
        elif streamed:
            click.echo()
        else:
            click.echo("\n---\n".join(a.text for a in answers))
        a = answers[0]
        click.echo(
            f"{a.prompt_tokens} prompt tokens, {a.new_tokens} new; first after {a.time_to_first_token * 1000:.0f} ms, "
            f"then {a.time_per_output_token * 1000:.1f} ms each",
            err=True,
        )
        return 0

    _run(run, as_json)


@main.command()
@click.argument("out", type=DIRECTORY)
@base_option
@click.option("--arms", help="What to time: eager, base, unfused, forward, backward, fused (OUT itself), lora, lora-budget.")
@click.option("--prompt-tokens", default="128", show_default=True, metavar="N,...", help="Prompt lengths to take the TTFT of.")
@click.option("--past-tokens", default="128", show_default=True, metavar="N,...", help="Past lengths to take the TPOT at.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Length of the whole generation.")
@click.option("--batch", default="1", show_default=True, metavar="N,...", help="Batch sizes.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each arm. Without it, all cores.")
@click.option("--rounds", type=click.IntRange(min=1), default=60, show_default=True, help="Rounds of TPOT; TTFT and the total get fewer.")
@click.option("--max-overhead", metavar="SHARE", help="Budget of OUT's TPOT over the base model's, such as 3%: exit code 1 unless proved.")
@click.option("--report", type=DIRECTORY, metavar="FILE", help="Write the result: a page where the name ends in .html, else JSON.")
@json_option
def bench(
    out: Path,
    base: str | None,
    arms: str | None,
    prompt_tokens: str,
    past_tokens: str,
    new_tokens: int,
    batch: str,
    threads: int | None,
    rounds: int,
    max_overhead: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure the latency of the artifact OUT beside its base model, LoRA and eager PyTorch."""

    def run() -> int:
        from flora_export import bench as measuring
        from flora_export.verify.formats import write_bench
        from flora_export.verify.latency import to_text

        numbers = measuring.whole_numbers
        options = measuring.BenchOptions(
            arms=tuple(arms.split(",")) if arms else measuring.DEFAULT_ARMS,
            prompt_tokens=numbers(prompt_tokens, "--prompt-tokens"),
            past_tokens=numbers(past_tokens, "--past-tokens"),
            new_tokens=new_tokens,
            batch=numbers(batch, "--batch"),
            threads=threads or 0,
            rounds=rounds,
            max_overhead=None if max_overhead is None else measuring.share(max_overhead, "--max-overhead"),
        )
        result = measuring.bench(out, base, options, _progress())
        write_bench(result, out.name, report)
        if as_json:
            _print_json(result)
        else:
            click.echo(to_text(result))
        return 0 if result["budget"] is None or result["budget"]["verdict"] == "pass" else 1

    _run(run, as_json)


def _run(command: Callable[[], int], as_json: bool) -> None:
    """Run a command and turn its errors into messages and exit codes."""
    try:
        code = command()
    except FloraExportError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json, getattr(error, "report", None))
    except KeyboardInterrupt:
        _fail("Interrupted", "interrupted; the output is as it was", 130, as_json)
    except click.ClickException:
        raise
    except Exception as error:  # a fault of ours: show where, and do not let it pass for a failed verification
        traceback.print_exc()
        _fail("InternalError", f"{type(error).__name__}: {error}. This is a bug in flora-export.", 3, as_json)
    else:
        sys.exit(code)


def _fail(kind: str, message: str, code: int, as_json: bool, report: dict[str, Any] | None = None) -> None:
    if as_json:
        _print_json({"verified": False, "error": kind, "message": message, "exit_code": code} | ({"report": report} if report else {}))
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, indent=1))


def _progress() -> Callable[[str, int, int], None]:
    """Says on stderr what is being done; counts in place where stderr is a terminal."""
    last = ""

    def show(what: str, done: int, of: int) -> None:
        nonlocal last
        if what != last:
            click.echo(("\n" if last and sys.stderr.isatty() else "") + f"{what} ...", err=True, nl=not sys.stderr.isatty())
            last = what
        elif sys.stderr.isatty():
            click.echo(f"\r{what} ... {done}/{of}", err=True, nl=done == of)
            last = "" if done == of else what

    return show


if __name__ == "__main__":
    main()
