"""The measured section of docs/edge.md, from benchmarks/results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METRICS = ("tpot", "ttft", "total")
OPENVINO = {"fused": "FFBA fused", "unfused": "FFBA beside its hosts", "lora": "LoRA beside"}
ORT = {"onnxruntime-base": "ONNX Runtime: base", "onnxruntime-fused": "FFBA fused", "onnxruntime-lora": "LoRA beside"}


def edge_section() -> str:
    """OpenVINO beside ONNX Runtime, what padding costs, and the browser."""
    edge, browser = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("edge", "browser"))
    steps = [row["ratio_to_base"] - 1 for row in edge["latency"] if (row["arm"], row["metric"]) == ("fused", "tpot")]
    sentence = [
        f"A fused adapter costs OpenVINO {min(steps):.0%} to {max(steps):.0%} of a decode step, more than its bytes: a Split and a Concat",
        "for each attention block are operators of their own there. Padding shows no gain, so that ranks are padded where int8 and int4",
        "need whole blocks, and nowhere else.",
    ]
    return "\n".join([*_runtimes(edge), "", *_alignment(edge), "", *sentence, "", *_browser(browser)])


def _runtimes(edge: dict[str, Any]) -> list[str]:
    found = {(row["precision"], row["arm"], row["metric"]): row for row in edge["latency"]}
    table = [
        "### What it costs in OpenVINO",
        "",
        "SmolLM2, rank 32 on attention and MLP, two threads ([edge.json](../benchmarks/results/edge.json)): ratios to the base model of",
        "the same runtime and precision (95 % interval; ONNX Runtime's are ratios of two). LoRA is unmerged, on all projections, in fp32.",
        "",
        "| precision | | decode, 128 past tokens | prefill, 128 tokens | 128 + 16 tokens | bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for precision in dict.fromkeys(row["precision"] for row in edge["latency"]):
        table.append(_base(precision, "OpenVINO: base", found, "base"))
        for arm, name in OPENVINO.items():
            cells = [found[precision, arm, metric] for metric in METRICS]
            ratios = [f"{c['ratio_to_base']:.3f} ({c['ratio_interval'][0]:.3f} to {c['ratio_interval'][1]:.3f})" for c in cells]
            table.append(f"| | {name} | " + " | ".join(ratios) + f" | {cells[0]['bytes'] / 1e6:.0f} MB |")
        for arm, name in ORT.items():
            if arm == "onnxruntime-base":
                table.append(_base("", name, found, arm, precision))
                continue
            cells = [(found[precision, arm, metric], found[precision, "onnxruntime-base", metric]) for metric in METRICS]
            ratios = [f"{cell['ratio_to_base'] / base['ratio_to_base']:.3f}" for cell, base in cells]
            table.append(f"| | {name} | " + " | ".join(ratios) + f" | {cells[0][0]['bytes'] / 1e6:.0f} MB |")
    return table


def _base(shown: str, name: str, found: dict[tuple[str, str, str], dict[str, Any]], arm: str, precision: str = "") -> str:
    cells = [found[precision or shown, arm, metric] for metric in METRICS]
    times = " | ".join(f"{cell['median_ms']:.1f} ms" for cell in cells)
    return f"| {shown} | {name} | {times} | {cells[0]['bytes'] / 1e6:.0f} MB |"


def _alignment(edge: dict[str, Any]) -> list[str]:
    found = {(row["arm"], row["metric"]): row for row in edge["alignment"]}
    rank = edge["alignment"][0]["rank"]
    table = [
        f"Padding: OpenVINO, fp32, rank {rank}, its ranks filled up with zeros to a multiple (`--align`), as ratios to the base.",
        "",
        "| multiple | decode | prefill | 128 + 16 tokens | bytes, ratio to base |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(row["arm"] for row in edge["alignment"]):
        if arm != "base":
            cells = [found[arm, metric] for metric in METRICS]
            ratios = [f"{c['ratio_to_base']:.3f} ({c['ratio_interval'][0]:.3f} to {c['ratio_interval'][1]:.3f})" for c in cells]
            size = cells[0]["bytes"] / found["base", "tpot"]["bytes"]
            table.append(f"| {arm.removeprefix('align ')} | " + " | ".join(ratios) + f" | {size:.3f} |")
    return table


def _browser(browser: dict[str, Any]) -> list[str]:
    found = {(row["precision"], row["threads"], row["arm"], row["metric"]): row for row in browser["rows"]}
    table = [
        f"The browser: onnxruntime-web {browser['npm']['onnxruntime-web']} on WASM in headless Chromium "
        f"{browser['chromium'].partition('.')[0]}, the same adapter and LoRA",
        "([browser.json](../benchmarks/results/browser.json)).",
        "",
        "| precision, threads | base: decode | prefill | FFBA fused: decode | prefill | LoRA beside: decode | prefill |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for precision, threads in dict.fromkeys((row["precision"], row["threads"]) for row in browser["rows"]):
        cells = []
        for arm in ("base", "fused", "lora"):
            for metric in ("decode", "prefill"):
                row = found[precision, threads, arm, metric]
                low, high = row.get("ratio_interval") or (0, 0)
                cells.append(
                    f"{row['milliseconds']['median']:.0f} ms" if arm == "base" else f"{row['ratio_to_base']:.3f} ({low:.3f} to {high:.3f})"
                )
        table.append(f"| {precision}, {threads} | " + " | ".join(cells) + " |")
    return table
