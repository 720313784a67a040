"""The checkpoint of `flora-export build --backend hf`, as a program of ExecuTorch: XNNPACK on the CPU, one prompt, a static KV cache.

    python examples/09_executorch/export.py OUT OUT.pte [--tokens 256]

Nothing here knows of adapters: transformers reads the plain checkpoint and traces it, and ExecuTorch lowers what it has traced. Beside the
program goes OUT.pte.json: what it was made of, and how long that took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from flora_export.artifact import MANIFEST, changed_files, open_artifact
from flora_export.base_model import file_sha256
from flora_export.errors import FloraExportError

PLACES = "get_max_context_len"  # ExecuTorch's name for a method that returns how many tokens the cache holds


def trace(checkpoint: Path, places: int) -> torch.export.ExportedProgram:
    """(input_ids [1, tokens], cache_position [tokens]) -> logits [1, tokens, vocabulary], for 1 to `places` tokens; the cache is inside."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", local_files_only=True).eval()
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=places)
    tokens = torch.export.Dim("tokens", min=1, max=places)
    example = torch.arange(3)
    return wrapped.export(
        input_ids=example[None],
        cache_position=example,
        dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
        strict=True,  # not strict, torch 2.13 traces without the writes to the cache, and lowering fails
    )


def lower(traced: torch.export.ExportedProgram, places: int) -> ExecutorchProgramManager:
    """What XNNPACK takes becomes calls of it; the rest stays with ExecuTorch's own operators."""
    edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()], constant_methods={PLACES: places})
    return edge.to_executorch()


@torch.no_grad()  # of all: lowering traces again
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="prompt and answer together: the places of the cache")
    options = parser.parse_args()
    try:
        artifact = open_artifact(options.out)
    except FloraExportError as error:
        sys.exit(str(error))
    if not artifact.is_checkpoint:
        sys.exit(f"{options.out} is no Hugging Face checkpoint, but of `--backend {artifact.manifest.backend}`. Build with --backend hf.")
    if faults := changed_files(artifact):
        sys.exit("\n".join([f"{options.out} is not as it was built:", *faults]))

    started = time.perf_counter()
    traced = trace(options.out, options.tokens)
    exported = time.perf_counter()
    program = lower(traced, options.tokens)
    lowered = time.perf_counter()
    with options.program.open("wb") as file:
        program.write_to_file(file)
    calls = [str(node.target) for node in program.exported_program().graph.nodes if node.op == "call_function"]
    record = {
        "command": f"python examples/09_executorch/export.py {options.out} {options.program} --tokens {options.tokens}",
        "manifest_sha256": file_sha256(options.out / MANIFEST),
        "pte_sha256": file_sha256(options.program),
        "pte_bytes": options.program.stat().st_size,
        "tokens": options.tokens,
        "export_seconds": round(exported - started, 1),
        "lower_seconds": round(lowered - exported, 1),
        "calls": {"xnnpack": calls.count("executorch_call_delegate"), "own": sum("aten." in call for call in calls)},
    }
    Path(f"{options.program}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
