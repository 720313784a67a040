"""Replays an artifact's golden vectors with optimum, and prints what it saw as JSON. Runs in the environment that check.py makes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported, else it reports to its makers

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.numpy import load_file

PACKAGES = ("optimum", "optimum-onnx", "transformers", "onnxruntime", "torch", "numpy")


@torch.no_grad()
def replay(model: Any, prompt: Any, tokens: Any, expected: Any) -> dict[str, Any]:
    """One recorded prompt: prefill, then a cached step for each token but the last. `expected` is [tokens, vocabulary]."""
    ids, past, total, rows = prompt, None, 0, []
    for token in tokens:
        total += len(ids)
        output = model(
            input_ids=torch.from_numpy(ids)[None],
            attention_mask=torch.ones(1, total, dtype=torch.int64),
            past_key_values=past,
            use_cache=True,
        )
        rows.append(output.logits[0, -1].float().numpy())
        past, ids = output.past_key_values, np.array([token])
    first = torch.from_numpy(prompt)[None]
    answer = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=len(tokens), do_sample=False)[0, len(prompt) :]
    return {
        "prompt_tokens": len(prompt),
        "steps": len(tokens),
        "largest_error": float(np.abs(np.stack(rows) - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "same_greedy_tokens": answer.tolist() == tokens[: len(answer)].tolist(),  # generate() stops at an end token
    }


def main(out: Path) -> None:
    model = ORTModelForCausalLM.from_pretrained(out)
    golden = load_file(out / "golden.safetensors")
    count = sum(name.endswith(".input_ids") for name in golden)
    prompts = [replay(model, *(golden[f"prompt.{i}.{key}"] for key in ("input_ids", "tokens", "logits"))) for i in range(count)]
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "prompts": prompts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
