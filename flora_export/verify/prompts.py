"""The prompts that an artifact is verified on: short and long, prose, code, numbers and other scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flora_export.artifact import Artifact

PROMPTS = (
    "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?",
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Water boils at 100 °C at sea level; on a mountain it boils at a lower temperature, because the pressure of the air above it is lower. "
    "Explain in two sentences why pasta takes longer to cook there, and what a cook can do about it. 日本語でもかまいません。",
)


def encode_prompts(artifact: Artifact, vocabulary: int, longest: int) -> tuple[list[list[int]], str]:
    """The prompts as token ids, cut to `longest`, and where they come from.

    An artifact without a tokenizer (a random model in a test) gets seeded token ids instead.
    """
    if (artifact.path / "tokenizer.json").is_file() or (artifact.path / "tokenizer.model").is_file():
        tokenizer = load_tokenizer(artifact.path)
        return [tokenizer(prompt)["input_ids"][:longest] for prompt in PROMPTS], "prompts that ship with flora-export"
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, size=min(size, longest)).tolist() for size in (11, 5, 8, 23)], "random token ids: there is no tokenizer"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of an artifact, read from its own files alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
