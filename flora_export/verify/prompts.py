"""The prompts that an artifact is verified on: short and long, prose, code, numbers and other scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flora_export.artifact import Artifact
from flora_export.base_model import BaseModel
from flora_export.errors import ArtifactError

PROMPTS = (
    "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?",
    "The capital of France is",
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "Water boils at 100 °C at sea level; on a mountain it boils at a lower temperature, because the pressure of the air above it is lower. "
    "Explain in two sentences why pasta takes longer to cook there, and what a cook can do about it. 日本語でもかまいません。",
)


MAX_FILE_BYTES = 2**20


def encode_prompts(path: Path, vocabulary: int, longest: int, file: Path | None = None) -> tuple[list[list[int]], str]:
    """The prompts as token ids, cut to `longest`, and where they come from: a file, one prompt a line, or those that ship.

    A directory without a tokenizer (a random model in a test) gets seeded token ids instead.

    Raises:
        ArtifactError: the file cannot be used.
    """
    texts: tuple[str, ...] = PROMPTS
    source = "prompts that ship with flora-export"
    if file is not None:
        texts, source = _read_prompts(file), f"prompts of {file.name}"
    if _has_tokenizer(path):
        tokenizer = load_tokenizer(path)
        rows = [tokenizer(text)["input_ids"][:longest] for text in texts]
        if not all(rows) or max(map(max, rows)) >= vocabulary:
            raise ArtifactError(f"{path}: its tokenizer gives no tokens, or tokens beyond the model's vocabulary of {vocabulary}")
        return rows, source
    if file is not None:
        raise ArtifactError(f"{path} has no tokenizer, so it cannot read the prompts of {file}")
    rng = np.random.default_rng(0)
    return [
        rng.integers(3, vocabulary, size=min(size, longest)).tolist() for size in (11, 5, 8, 23)
    ], "random token ids: there is no tokenizer"


def _read_prompts(file: Path) -> tuple[str, ...]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"{file}: more than {MAX_FILE_BYTES} bytes of prompts")
        texts = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: prompts cannot be read ({error})") from error
    if not texts:
        raise ArtifactError(f"{file}: has no prompts; write one a line")
    return texts


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
    """The tokenizer of a directory, read from its own files alone. Raises ArtifactError where there is none, or a broken one."""
    import transformers

    if not _has_tokenizer(path):
        raise ArtifactError(f"{path} has no tokenizer")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it remarks on the class name that ONNX Runtime GenAI wants
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json can raise nearly anything
        raise ArtifactError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
