"""Builds and verifies models larger than memory: seconds, the most memory beside what is mapped from files, what a dry run said.

    python -m benchmarks.large --shapes 1b 3b 8b --work DIR

Random weights in fp16 in the shapes of Llama 3.2 1B and 3B and Llama 3.1 8B, made on disk; the tokenizer is SmolLM2's. `8b:12` has twelve
of its layers, where there is too little disk or time, and its row says so. Writes benchmarks/results/large.json after each size; rows of
other sizes stay as they are there, each with the processor that it was measured on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, write_result
from flora_export.forecast import anonymous_bytes
from flora_export.shards import Planned, write_shards
from flora_export.verify.latency import environment

ROOT = Path(__file__).parent.parent
RESULT = RESULTS / "large.json"
TOKENIZER = ROOT / "models" / "smollm2"
LAYERS = {"tiny": 2, "1b": 16, "3b": 28, "8b": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128},
    "1b": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192},
    "3b": {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192},
    "8b": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336},
}
RANK = 16
NOT_POSSIBLE = 3  # exit code of a dry run
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
POOL = 2**24  # random numbers, of which every weight takes its own stretch: as fast as the disk


def make_base(directory: Path, shape: str, layers: int) -> Path:
    """A Llama with random weights, and SmolLM2's tokenizer."""
    sizes = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152 if shape == "tiny" else 128256,
        "num_hidden_layers": layers, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": shape != "8b", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False, "mlp_bias": False, "dtype": "float16",
    } | sizes  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for file in TOKENIZER.glob("*token*"):
        shutil.copyfile(file, directory / file.name)
    pool = (0.02 * np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)).astype(np.float16)

    def planned(name: str, dims: tuple[int, ...]) -> Planned:
        def read() -> np.ndarray[Any, Any]:
            if len(dims) == 1:
                return np.ones(dims, np.float16)
            start = zlib.crc32(name.encode()) % POOL // 2
            return np.resize(pool[start:], dims)

        return Planned(name, np.dtype(np.float16), dims, read)

    write_shards(directory, [planned(name, dims) for name, dims in tensors_of(config)])
    return directory


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's weights."""
    d, ff, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", (vocabulary, d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, dims in (
            ("self_attn.q_proj", (q, d)), ("self_attn.k_proj", (kv, d)), ("self_attn.v_proj", (kv, d)), ("self_attn.o_proj", (d, q)),
            ("mlp.gate_proj", (ff, d)), ("mlp.up_proj", (ff, d)), ("mlp.down_proj", (d, ff)),
            ("input_layernorm", (d,)), ("post_attention_layernorm", (d,)),
        ):  # fmt: skip
            yield f"{at}{name}.weight", dims
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, d)


def make_adapter(base: Path, directory: Path) -> Path:
    """A random FFBA adapter of full strength on attention and MLP."""
    import peft
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from flora_export.ffba import FFBAConfig

    config = FFBAConfig(r=RANK, alpha=float(RANK), gated_gain=1.0, init_ffba_weights=False, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    with init_empty_weights():
        model = peft.get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)), config)
        state = peft.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    config.inference_mode = True
    config.save_pretrained(directory)
    save_file(
        {name: torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5 for name, tensor in state.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds of a command, the most of its memory that no file backs, and what it read from disks, in all and by each phase's end."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    phases: dict[str, dict[str, float]] = {}
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    last, text = "start", b""
    while process.poll() is None:
        text += process.stderr.read() or b""
        *lines, text = text.split(b"\n")
        last = lines[-1].decode().removesuffix(" ...") if lines else last
        anonymous = anonymous_bytes(process.pid)
        peak = max(peak, anonymous)
        phase = phases.setdefault(last, {"started_s": round(time.perf_counter() - started, 1), "anonymous_mib": 0})
        phase["anonymous_mib"] = max(phase["anonymous_mib"], anonymous >> 20)
        phase["read_mib"] = max(phase.get("read_mib", 0), read_bytes(process.pid) >> 20)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {last} {text!r} {process.stderr.read()!r}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_anonymous_mib": peak >> 20, "phases": phases}


def read_bytes(pid: int) -> int:
    """What a process has had from disks so far, pages of mapped files that were not in memory among it; 0 where it has ended."""
    with contextlib.suppress(OSError):
        return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("read_bytes:"))
    return 0


def run(shape: str, layers: int, work: Path, precision: str) -> dict[str, Any]:
    """Ask what a build takes, then build, verification included."""
    base, adapter, out = work / "base", work / "adapter", work / "out"
    make_base(base, shape, layers)
    make_adapter(base, adapter)
    command = [sys.executable, "-m", "flora_export.cli"]
    built = [*command, "build", str(adapter), "--base", str(base), "--backend", "onnxruntime", "--precision", precision]
    row: dict[str, Any] = {
        "processor": environment()["cpu"],
        "layers": layers,
        "base_mib": sum(f.stat().st_size for f in base.iterdir()) >> 20,
    }
    asked = [*built, "--quick", "--output", str(out), "--dry-run", "--json"]
    told = subprocess.run(asked, check=False, env=ENVIRONMENT, stdout=subprocess.PIPE)
    if told.returncode not in (0, NOT_POSSIBLE):
        sys.exit(f"the dry run of {shape} failed: {told.returncode}")
    row["dry_run"] = json.loads(told.stdout)  # what is not possible by it is tried all the same: it is what is measured here
    row["build"] = measured([*built, "--quick", "--output", str(out)])
    written, cost = sum(file.stat().st_size for file in out.iterdir()), row["dry_run"]["cost"]
    row["artifact_mib"] = written >> 20
    row["told_by_measured"] = {
        "seconds": round(cost["seconds"] / row["build"]["seconds"], 3),
        "memory": round(cost["memory"] / 2**20 / row["build"]["peak_anonymous_mib"], 3),
        "disk": round(cost["disk"] / written, 3),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1b", "3b", "8b"], metavar="SHAPE[:LAYERS]", help=", ".join(SHAPES))
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="Made, and taken away again.")
    arguments = parser.parse_args()
    settings = {"precision": arguments.precision, "rank": RANK}
    former = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    rows: dict[str, Any] = former["sizes"] if settings.items() <= former.items() else {}
    for asked in arguments.shapes:
        shape, _, layers = asked.partition(":")
        work = arguments.work / asked
        work.mkdir(parents=True)
        try:
            rows[asked] = run(shape, int(layers or LAYERS[shape]), work, arguments.precision)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        write_result("large", settings | {"sizes": {asked: rows[asked] for asked in sorted(rows)}})


if __name__ == "__main__":
    main()
