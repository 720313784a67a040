"""What a rank-32 adapter costs SmolLM2 on the CPU, fused, half fused and unfused, beside LoRA and eager PyTorch: `flora-export bench`.

python benchmarks/decode.py --base models/smollm2
python benchmarks/decode.py --base models/smollm2 --adapter examples/01_train_ffba/adapter_mlp --arms base,fused --result decode_mlp
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import random_adapter, write_result

from flora_export.bench import BenchOptions, bench
from flora_export.pipeline import BuildOptions, build

ARMS = ("eager", "base", "unfused", "forward", "backward", "fused", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="measure this one instead of a random one on attention and MLP")
    parser.add_argument("--rank", type=int, default=32, help="of the random one")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--result", default="decode", help="name of the file under benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-overhead", type=float, default=0.03, help="budget of the fused decode step, promised by the README")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        adapter = options.adapter or random_adapter(options.base, Path(work) / "adapter", options.rank)
        artifact, _ = build(adapter, str(options.base), Path(work) / "out", BuildOptions(verify=False), show)
        what = BenchOptions(
            arms=tuple(options.arms.split(",")), threads=options.threads, rounds=options.rounds, max_overhead=options.max_overhead
        )
        result = bench(artifact.path, str(options.base), what, show)
    del result["command"], result["environment"]  # write_result has its own
    write_result(options.result, result)


def show(what: str, done: int, of: int) -> None:
    """Progress, on stderr."""
    print(f"\r{what} ... {done}/{of}   ", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
