"""Write the measured sections of README.md and of pages under docs/ from the files under benchmarks/results/.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accuracy_tables import frontier_paragraph, frontier_section, method_section
from edge_tables import edge_section
from reliability_tables import reliability_paragraph, reliability_section
from scale_tables import fleet_table, large_table

ROOT = Path(__file__).parent.parent
START, END = "<!-- measured: written by `make readme-tables` -->", "<!-- end of measured -->"
ARMS = {
    "fused": "FFBA fused (`--fuse both`)",
    "forward": "FFBA fused forward only",
    "backward": "FFBA fused backward only",
    "unfused": "FFBA unfused (`--fuse none`)",
    "lora": "LoRA of the same rank on all projections, unmerged",
    "eager": "FFBA unfused in eager PyTorch",
}
METRICS = ("tpot", "ttft", "total")


def section() -> str:
    """The measured section, without its heading."""
    results = "benchmarks/results"
    examples = "examples/01_train_ffba"
    names = ("decode", "build", "engines", "decode_mlp", "serve", "quantized", "methods", "bank")
    files = [f"{results}/{name}.json" for name in names]
    files += [f"{examples}/{adapter}/training.json" for adapter in ("adapter", "adapter_mlp")]
    decode, build, engines, decode_mlp, serve, quantized, methods, bank, training, training_mlp = (
        json.loads((ROOT / file).read_text()) for file in files
    )
    settings = decode["settings"]
    past, prompt, new = settings["past_tokens"][0], settings["prompt_tokens"][0], settings["new_tokens"]
    scores = f"{training['exact_before']:.2f} to {training['exact_after']:.2f}"
    paragraphs = [
        [
            "[decode.json](benchmarks/results/decode.json): SmolLM2-135M fp32,",
            f"rank {decode['artifact']['rank'][0]} on attention and MLP, ONNX Runtime on {settings['threads']} CPU threads;",
            "arms interleaved in one run, ratios taken round by round, medians.",
            f"The base's decode step took {milliseconds(decode, 'base', 'tpot'):.1f} ms.",
            f"The fused model's weights are {decode['bytes_ratio_to_base']['fused']:.3f} times the base's bytes.",
            "LoRA here is its strongest unmerged form: packed projections stay packed.",
        ],
        [
            f"A build takes {build['ratio_seconds']:.2f} times as long as mobius's own build and save of the base,",
            f"at {build['ratio_memory']:.2f} times its peak memory ([build.json](benchmarks/results/build.json)):",
            "weights are widened one at a time, as they are written.",
        ],
        engine_paragraph(engines),
        [
            f"The example's adapter (rank 8, 0.7 M parameters, {training['training_seconds'] / 60:.0f} minutes of training on two cores)",
            f"takes exact answers on {training['held_out_problems']} held-out word problems from {scores}",
            "([training.json](examples/01_train_ffba/adapter/training.json)).",
            *mlp_paragraph(decode_mlp, training_mlp),
        ],
        quantized_rows(quantized),
        price_rows(quantized),
        methods_rows(methods),
        bank_paragraph(bank),
        serve_paragraph(serve),
        large_table(),
        fleet_table(),
        reliability_paragraph(),
        frontier_paragraph(),
    ]
    head = f"| ratio to the base model (95 % interval) | decode, {past} past tokens | prefill, {prompt} tokens | {prompt} + {new} tokens |"
    table = [head, "| --- | --- | --- | --- |", *rows(decode)]
    return "\n".join(table) + "\n\n" + "\n\n".join("\n".join(paragraph) for paragraph in paragraphs)


def rows(decode: dict[str, Any]) -> list[str]:
    """An arm a row; decode, prefill and whole generation as ratios to base."""
    cells = {(m["arm"], m["metric"]): m for m in reversed(decode["measurements"]) if m["batch"] == 1}  # the first of each stays
    table = []
    for arm, name in ARMS.items():
        ratios = [(m["ratio_to_base"], *m["ratio_interval"]) for m in (cells[(arm, metric)] for metric in METRICS)]
        table.append(f"| {name} | " + " | ".join(f"{ratio:.3f} ({low:.3f} to {high:.3f})" for ratio, low, high in ratios) + " |")
    return table


def engine_paragraph(engines: dict[str, Any]) -> list[str]:
    """What a decode step of an engine is made of, with a growing cache."""
    arms = {row["arm"]: row for row in engines["arms"] if row["kv_cache"] == "growing"}
    kernels = {arm: row["kernels"]["decode"] for arm, row in arms.items()}
    gemms = {arm: row["gemms"]["decode"] for arm, row in arms.items()}
    assert gemms["fused"] == gemms["base"] and kernels["fused"] - kernels["base"] == engines["layers"], "the sentence below is not true"
    return [
        f"In an engine of {engines['flavour']} {engines['version']} ({engines['precision']}, rank {engines['rank']}),",
        f"a decode step of the fused model has the base's {gemms['base']} GEMMs",
        f"and one more kernel per attention block: {kernels['fused']}, the base {kernels['base']}.",
        f"Unfused it has {kernels['unfused']}, with LoRA {kernels['lora']} and {gemms['lora']} GEMMs",
        "([engines.json](benchmarks/results/engines.json); counted from the builder's list of layers, not timed).",
    ]


QUANTIZED_ARMS = {
    "fused": "FFBA fused",
    "unfused": "FFBA in fp32 beside",
    "lora": "LoRA in fp32 beside, packed",
    "genai": "the same base by GenAI's builder",
    "genai-lora": "GenAI's builder with its own int4 LoRA",
}


def quantized_rows(quantized: dict[str, Any]) -> list[str]:
    """What an adapter costs on a quantized base, a row for each base, precision and arm."""
    found = {(row["base"], row["precision"], row["arm"], row["metric"]): row for row in reversed(quantized["latency"])}
    table = [
        "**int4 and int8**, rank 32: ratio to the quantized base model alone ([quantized.json](benchmarks/results/quantized.json)).",
        "The tied table of embeddings and head is int8 in ours, int4 in GenAI's, whose builder does not take Gemma 3 270M.",
        "",
        "| base, precision | arm | decode, 128 past tokens | prefill, 128 tokens | 128 + 32 tokens | bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for base, precision in dict.fromkeys((row["base"], row["precision"]) for row in quantized["latency"]):
        bare = found[base, precision, "base", "tpot"]
        table.append(f"| {base}, {precision} | base | {bare['median_ms']:.1f} ms | 1 | 1 | {bare['bytes'] / 1e6:.0f} MB |")
        for arm, name in QUANTIZED_ARMS.items():
            if (base, precision, arm, "tpot") in found:
                cells = [found[base, precision, arm, metric] for metric in METRICS]
                ratios = [
                    f"{cell['ratio_to_base']:.3f} ({cell['ratio_interval'][0]:.3f} to {cell['ratio_interval'][1]:.3f})" for cell in cells
                ]
                table.append(f"| | {name} | " + " | ".join(ratios) + f" | {cells[0]['bytes'] / 1e6:.0f} MB |")
    return table


def price_rows(quantized: dict[str, Any]) -> list[str]:
    """What quantization costs the example's adapter, a row a form."""
    table = [
        "What it costs the example's adapter: exact answers on held-out problems; KL divergence of next-token distributions from the model",
        "as it was trained; how far the adapter's effect moves, by all of it, and by rounding A, B and G alone.",
        "",
        "| form | exact answers | nats per token | effect moved | by its own rounding | bytes | build, verified |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form in quantized["forms"]:
        price = form["price"] or {}
        cells = [f"{price['kl_mean']:.3g}", f"{price['effect_error']:.1%}"] if price else ["0", "0"]
        own = price.get("adapter_loss")
        cells += ["-" if own is None else f"{own:.2%}", f"{form['bytes'] / 1e6:.0f} MB", f"{form['verified_build_seconds']:.0f} s"]
        table.append(f"| {form['form']} | {form['exact_answers']:.2f} | " + " | ".join(cells) + " |")
    return table


def methods_rows(methods: dict[str, Any]) -> list[str]:
    """Every kind of adapter that was tried on the real model, a row each."""
    table = [
        f"**Every method**, trained for {methods['steps']} steps on SmolLM2, built and verified",
        "([methods.json](benchmarks/results/methods.json)):",
        "",
        "| method | trainable | in the artifact | error of its effect, noise floors | decode step, ratio to base |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in methods["methods"]:
        if "error" in row:
            table.append(f"| {row['method']} | | refused: {row['error'].splitlines()[0]} | | |")
            continue
        merged = "" if any("merged" in how for how in row["how"]) else "merged: "
        how = "A fused, B beside" if row["how"] == ["forward"] else f"{'fused: ' if row['branches'] else merged}{', '.join(row['how'])}"
        low, high = row["decode_interval"]
        table.append(
            f"| {row['method']} | {row['trainable'] / 1e6:.2f} M | {how} | "
            f"{row['effect_floors']:.1f} | {row['decode_ratio']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return table


def mlp_paragraph(decode: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """The adapter that lives in MLPs alone: its accuracy and latency."""
    ratios = {(m["arm"], m["metric"]): (m["ratio_to_base"], *m["ratio_interval"]) for m in decode["measurements"] if m["arm"] != "base"}
    (fused, *interval), (lora, *_) = ratios[("fused", "tpot")], ratios[("lora-budget", "tpot")]
    scores = f"{training['exact_before']:.2f} to {training['exact_after']:.2f}"
    return [
        f"One of rank {decode['artifact']['rank'][0]} in the MLPs alone, trained by the same steps, takes them from {scores}",
        "([training.json](examples/01_train_ffba/adapter_mlp/training.json)),",
        f"and its fused decode step takes {fused:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) times the base's;",
        f"a LoRA of as many parameters takes {lora:.3f} ([decode_mlp.json](benchmarks/results/decode_mlp.json)).",
    ]


def serve_paragraph(serve: dict[str, Any]) -> list[str]:
    """What a tritonserver delivers on this machine, with one client and with the most."""
    one, most = serve["levels"][0], serve["levels"][-1]
    return [
        f"A tritonserver {serve['server']['tritonserver']} on the same two cores, which its clients share, streams",
        f"{one['tokens_per_second']:.0f} tokens per second to one client",
        f"and {most['tokens_per_second']:.0f} to {most['clients']} together;",
        f"the first piece comes after {one['first_piece']['p50']:.2f} s (p99 {one['first_piece']['p99']:.2f} s)",
        f"and {most['first_piece']['p50']:.2f} s (p99 {most['first_piece']['p99']:.2f} s)",
        "([serve.json](benchmarks/results/serve.json)).",
    ]


def milliseconds(decode: dict[str, Any], arm: str, metric: str) -> float:
    return next(float(m["median_ms"]) for m in decode["measurements"] if (m["arm"], m["metric"], m["batch"]) == (arm, metric, 1))


VERIFICATION = ("machines", "other_bases", "verify_cost")


def verification_section() -> str:
    """The matrix of machines, the real base models, and what verification takes."""
    machines, bases, cost = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in VERIFICATION)
    lines = ["| setting | right ones that pass | wrong ones that are caught | bytes of the artifacts |", "| --- | --- | --- | --- |"]
    for name, row in machines["settings"].items():
        built = row["artifacts"].values()
        passed, of = row["right_passed"] + sum(a["verified"] for a in built), row["right"] + len(built)
        lines.append(
            f"| {name} | {passed} of {of} | {row['wrong_caught']} of {row['wrong']} | {'equal' if row['same_bytes'] else 'differ'} |"
        )
    lines += [
        "",
        f"[machines.json](../benchmarks/results/machines.json): {machines['processor']}; tiny models of the tests, and SmolLM2 with the",
        "example's adapter. It names what was set for each row.",
        "",
        "Real base models, an adapter of random numbers, fp32 ([other_bases.json](../benchmarks/results/other_bases.json)):",
        "",
        "| base model | family | verified | largest logit | most floors, logits | most floors, effect |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, base in bases["bases"].items():
        numbers = f"{base['largest_logit']:.0f} | {base['most_floors_logits']:.1f} | {base['most_floors_effect']:.1f}"
        lines.append(f"| {name} | {base['family']} | {'yes' if base['verified'] else 'no'} | {numbers} |")
    times = "; ".join(
        f"{precision} {row['now']['seconds']:.0f} s ({row['ratio_seconds']:.2f} times the time, {row['ratio_memory']:.2f} times the memory)"
        for precision, row in cost["precisions"].items()
    )
    lines += [
        "",
        f"Comparing SmolLM2's numbers takes, on {cost['environment']['cores']} cores: {times}.",
        "The ratios are to the verification that had fp32 as its truth",
    ]
    return "\n".join([*lines, "([verify_cost.json](../benchmarks/results/verify_cost.json))."])


def bank_paragraph(bank: dict[str, Any]) -> list[str]:
    """What sixteen adapters cost, and a swap."""
    step = {row["arm"]: row for row in bank["measurements"] if (row["rank"], row["metric"], row["batch"]) == (8, "tpot", 1)}
    columns, stack, single, lora = (interval(step[arm]) for arm in ("columns-16", "stack-16", "single", "lora"))
    swap = bank["swap"]
    return [
        f"**A bank** of 16 adapters of rank 8 takes {columns} of the base's decode step side by side, {stack} stacked;",
        f"one of them by itself {single}, one unmerged LoRA of that rank {lora}.",
        f"Replacing an adapter in memory takes {swap['swap_seconds']['median'] * 1000:.0f} ms, its file read, checked and compared;",
        f"a decode step then takes {swap['decode_ratio_to_file_after'] / swap['decode_ratio_to_file_before']:.3f} of what it took before",
        "([bank.json](benchmarks/results/bank.json), [docs/bank.md](docs/bank.md)).",
    ]


def interval(row: dict[str, Any]) -> str:
    low, high = row["ratio_interval"]
    return f"{row['ratio_to_base']:.3f} ({low:.3f} to {high:.3f})"


BANK_ARMS = {
    "base": "the base model alone",
    "single": "one adapter, fused",
    "lora": "one LoRA, unmerged",
    "genai-lora": "one LoRA by GenAI's builder",
}


def bank_section() -> str:
    """The tables of docs/bank.md."""
    names = ("bank", "bank_served", "bank_lora")
    bank, served, loras = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in names)
    beside = {(row["arm"], row["metric"], row["batch"]): row for row in loras["measurements"]}
    found = {(row["rank"], row["arm"], row["metric"], row["batch"]): row for row in bank["measurements"]}
    lines = []
    for rank in dict.fromkeys(row["rank"] for row in bank["measurements"]):
        lines += [
            f"**Rank {rank}**, ratio to the base model (95 % interval):",
            "",
            "| adapters | decode, 1 row | decode, 8 rows | prefill, 1 row | prefill, 8 rows | bytes |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for arm in dict.fromkeys(row["arm"] for row in bank["measurements"]):
            cells = [found[rank, arm, metric, batch] for metric, batch in (("tpot", 1), ("tpot", 8), ("ttft", 1), ("ttft", 8))]
            figures = [f"{cell['median_ms']:.1f} ms" if arm == "base" else interval(cell) for cell in cells]
            layout, _, count = arm.rpartition("-")
            name = BANK_ARMS.get(arm) or f"{count} in {'columns' if layout == 'columns' else 'a stack'}"
            lines.append(f"| {name} | {' | '.join(figures)} | {cells[0]['bytes'] / 1e6:.0f} MB |")
        lines.append("")
    lines += [
        f"**LoRA of rank {loras['measurements'][0]['rank']}** on all projections, in columns, ratio to the base model",
        "([bank_lora.json](../benchmarks/results/bank_lora.json)):",
        "",
        "| LoRAs | decode, 1 row | decode, 8 rows | prefill, 1 row | prefill, 8 rows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(row["arm"] for row in loras["measurements"] if row["arm"] != "base"):
        figures = [interval(beside[arm, metric, batch]) for metric, batch in (("tpot", 1), ("tpot", 8), ("ttft", 1), ("ttft", 8))]
        name = {"lora": "one, A and B beside", "lora-forward": "one, A fused"}.get(arm) or f"a bank of {arm.rpartition('-')[2]}"
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines.append("")
    swap, seconds = bank["swap"], bank["swap"]["swap_seconds"]
    kept = swap["decode_ratio_to_file_after"] / swap["decode_ratio_to_file_before"]
    speeds = {arm: [row["tokens_per_second"] for row in served["served"] if row["arm"] == arm] for arm in ("single", "bank")}
    return "\n".join(
        [
            *lines,
            "SmolLM2-135M fp32, prompts and pasts of 128 tokens, two shared cores: where an interval is wide, it was disturbed",
            "([bank.json](../benchmarks/results/bank.json)).",
            "",
            f"A swap in a loaded bank of {swap['adapters']} adapters of rank {swap['rank']} takes {seconds['median'] * 1000:.0f} ms "
            f"({seconds['min'] * 1000:.0f} to {seconds['max'] * 1000:.0f}), loading the bank {swap['load_seconds']:.2f} s. A decode "
            f"step then takes {kept:.3f} of what it took before. The stacks are {swap['stack_bytes'] / 1e6:.0f} MB.",
            "",
            f"A tritonserver streams {' and '.join(f'{speed:.0f}' for speed in speeds['bank'])} tokens per second to 8 clients that ask 16 "
            f"adapters, and {' and '.join(f'{speed:.0f}' for speed in speeds['single'])} from an artifact of one adapter "
            "([bank_served.json](../benchmarks/results/bank_served.json)).",
        ]
    )


SECTIONS = {
    "README.md": section,
    "docs/method.md": method_section,
    "docs/frontier.md": frontier_section,
    "docs/verification.md": verification_section,
    "docs/bank.md": bank_section,
    "docs/edge.md": edge_section,
    "docs/reliability.md": reliability_section,
}


def main() -> None:
    for name, write in SECTIONS.items():
        head, rest = (ROOT / name).read_text().split(START)
        (ROOT / name).write_text(f"{head}{START}\n{write()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
