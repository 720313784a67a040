"""What a rank-32 adapter costs in a browser: fused, and as unmerged LoRA, beside the base, in onnxruntime-web on WASM in headless Chromium.

    python benchmarks/browser.py --base models/smollm2

It needs the extra `dev` and `make browser-dependencies`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import random_adapter, summary, write_result

from flora_export.artifact import DATA, MODEL, Artifact, link_or_copy, seal
from flora_export.base_model import load_base
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.build_arms import build_arm
from flora_export.verify.latency import median_interval

EXAMPLE = Path(__file__).parent.parent / "examples" / "08_browser"
sys.path.insert(0, str(EXAMPLE))
import ask_page  # noqa: E402

ARMS = ("base", "fused", "lora")
METRICS = ("prefill", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", default=["int4", "fp32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="decode steps after each prefill")
    parser.add_argument("--result", default="browser", help="name of the file under benchmarks/results/")
    options = parser.parse_args()
    with ask_page.chromium() as browser:
        version = browser.version
        rows = [row for precision in options.precision for row in time_precision(browser, precision, options)]
    packages = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    what = (
        f"{options.base.name}, rank {options.rank}: prefill of {options.prompt_tokens} tokens and {options.steps} decode steps after it, "
        "in headless Chromium on WASM; a page and a worker for each arm, interleaved, one of them working at a time; milliseconds are the "
        "worker's own, argmax and the copies between JavaScript and WASM included; ratios round by round, medians, 95 % intervals"
    )
    settings = {"rounds": options.rounds, "prompt_tokens": options.prompt_tokens, "steps": options.steps}
    write_result(options.result, {"what": what, "chromium": version, "npm": packages, "settings": settings, "rows": rows})


def time_precision(browser: Any, precision: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of threads, metric and arm."""
    with tempfile.TemporaryDirectory() as name:
        arms = build_arms(options.base, precision, options.rank, Path(name))
        for threads in options.threads:
            print(f"{precision}, {threads} threads", file=sys.stderr, flush=True)
            samples = time_arms(browser, arms, threads, options)
            for metric in METRICS:
                for arm, out in arms.items():
                    ratios = [ms / base for ms, base in zip(samples[arm][metric], samples["base"][metric], strict=True)]
                    row = {"precision": precision, "threads": threads, "metric": metric, "arm": arm}
                    row |= {"milliseconds": summary(samples[arm][metric]), "bytes": (out / DATA).stat().st_size}
                    yield row | {"ratio_to_base": float(np.median(ratios)), "ratio_interval": list(median_interval([ratios]))}


def build_arms(path: Path, precision: str, rank: int, work: Path) -> dict[str, Path]:
    """An artifact of each arm, complete enough for the page."""
    base = load_base(str(path))
    adapter = random_adapter(path, work / "adapter", rank)
    artifact, _ = build(adapter, str(path), work / "out", BuildOptions(precision=precision, verify=False), lambda *_: None)
    checkpoint = load_checkpoint(adapter, base)
    built = {arm: build_arm(arm, artifact, base, checkpoint, work / arm).artifact for arm in ARMS}
    return {arm: complete(each, artifact) for arm, each in built.items() if each is not None}


def complete(arm: Artifact, artifact: Artifact) -> Path:
    """Put the artifact's other files beside an arm's graph, and a manifest."""
    if arm.path != artifact.path:
        for name in artifact.manifest.files.keys() - {MODEL, DATA}:
            link_or_copy(artifact.path / name, arm.path / name)
        seal(arm.path, arm.manifest)
    return arm.path


def time_arms(browser: Any, arms: dict[str, Path], threads: int, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by arm and metric, a number for each round: of decode steps their median in that round."""
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        pages = {arm: stack.enter_context(ask_page.opened(browser, out, threads=threads)) for arm, out in arms.items()}
        for page in pages.values():
            if (wrong := ask_page.problem(page)) is not None:
                sys.exit(wrong)
        samples: dict[str, dict[str, list[float]]] = {arm: {metric: [] for metric in METRICS} for arm in arms}
        for round_ in range(-1, options.rounds):  # the first warms up
            ids = rng.integers(3, 1000, options.prompt_tokens).tolist()
            for arm in rng.permutation(list(arms)):
                first, *steps = ask_page.call(pages[arm], "decode", ids=ids, tokens=options.steps + 1, stop=False)["times"]
                if round_ >= 0:
                    samples[arm]["prefill"].append(first)
                    samples[arm]["decode"].append(float(np.median(steps)))
    return samples


if __name__ == "__main__":
    main()
