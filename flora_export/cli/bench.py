"""bench: latency arms."""

from __future__ import annotations

from pathlib import Path

import click

from flora_export.cli.common import DIRECTORY, json_option, print_json, progress, run_command


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--base", metavar="DIR", help="Base model: a directory or hub name. Without it, the one that OUT was built with.")
@click.option(
    "--arms",
    help="What to time: eager, base, unfused, forward, backward, fused (OUT itself), lora, lora-budget, lora-forward, lora-merged; "
    "of a bank: base, single, bank (OUT itself), lora.",
)
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
        result = measuring.bench(out, base, options, progress())
        write_bench(result, out.name, report)
        if as_json:
            print_json(result)
        else:
            click.echo(to_text(result))
        return 0 if result["budget"] is None or result["budget"]["verdict"] == "pass" else 1

    run_command(run, as_json)
