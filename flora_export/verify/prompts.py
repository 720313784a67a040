"""The prompts that an artifact is verified on: short and long, prose, code, numbers and other scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flora_export.artifact import Artifact
from flora_export.base_model import BaseModel

PROMPTS = (
    "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?",
    "The capital of France is",
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "Water boils at 100 °C at sea level; on a mountain it boils at a lower temperature, because the pressure of the air above it is lower. "
    "Explain in two sentences why pasta takes longer to cook there, and what a cook can do about it. 日本語でもかまいません。",
)


def encode_prompts(artifact: Artifact, vocabulary: int, longest: int) -> tuple[list[list[int]], str]:
    """The prompts as token ids, cut to `longest`, and where they come from.

    An artifact without a tokenizer (a random model in a test) gets seeded token ids instead.
    """
    if _has_tokenizer(artifact.path):
        tokenizer = load_tokenizer(artifact.path)
        return [tokenizer(prompt)["input_ids"][:longest] for prompt in PROMPTS], "prompts that ship with flora-export"
    rng = np.random.default_rng(0)
    return [
        rng.integers(3, vocabulary, size=min(size, longest)).tolist() for size in (11, 5, 8, 23)
    ], "random token ids: there is no tokenizer"


def tokenizer_faults(artifact: Artifact, base: BaseModel) -> list[str]:
    """Prompts that the artifact's tokenizer and the base model's encode differently."""
    if not _has_tokenizer(artifact.path):
        return [f"the base model has a tokenizer, but {artifact.path.name} has none"] if _has_tokenizer(base.path) else []
    ours, theirs = load_tokenizer(artifact.path), load_tokenizer(base.path)
    return [
        f"the artifact's tokenizer encodes {p[:30]!r} unlike the base model's"
        for p in PROMPTS
        if ours(p)["input_ids"] != theirs(p)["input_ids"]
    ]


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory, read from its own files alone."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it remarks on the class name that ONNX Runtime GenAI wants
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    finally:
        transformers.logging.set_verbosity(verbosity)
