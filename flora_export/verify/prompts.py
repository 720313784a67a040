"""The prompts that an artifact is verified on: short and long, prose, code, numbers and other scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.artifact import Artifact
from flora_export.base_model import BaseModel, read_json
from flora_export.bounded import SECONDS, bounded
from flora_export.errors import ArtifactError, CheckpointError

PROMPTS = (
    "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?",
    "The capital of France is",
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "Water boils at 100 °C at sea level; on a mountain it boils at a lower temperature, because the pressure of the air above it is lower. "
    "Explain in two sentences why pasta takes longer to cook there, and what a cook can do about it. 日本語でもかまいません。",
)


MAX_FILE_BYTES = 2**20
CHARACTERS_PER_SECOND = 100_000  # that any tokenizer reads
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MOST_WORDS, MOST_ADDED = 2**19, 2**14  # Gemma 3 has 2^18 words, and 6,415 added tokens
ADDED = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")


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
        rows = [row[:longest] for row in encode_texts(tokenizer, texts)]
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
    pairs = zip(PROMPTS, encode_texts(ours, PROMPTS), encode_texts(theirs, PROMPTS), strict=True)
    return [f"the artifact's tokenizer encodes {p[:30]!r} unlike the base model's" for p, one, other in pairs if one != other]


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file()


def encode_texts(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Texts as token ids. Raises ArtifactError where a tokenizer's patterns take too long or too much memory."""
    seconds = SECONDS + sum(map(len, texts)) / CHARACTERS_PER_SECOND
    rows: list[list[int]] = bounded(lambda: [list(tokenizer(text, **options)["input_ids"]) for text in texts], "the tokenizer", seconds)
    return rows


def _check_size(path: Path) -> None:
    """Raises ArtifactError: a file of the tokenizer is no JSON, or has more in it than any tokenizer needs and can be loaded in time."""
    for name in TOKENIZER_FILES:
        if not (path / name).exists():
            continue
        try:
            content = read_json(path / name, "tokenizer")
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        model = content.get("model")
        words = len(vocabulary) if isinstance(model, dict) and isinstance(vocabulary := model.get("vocab"), dict | list) else 0
        added = sum(len(each) for key in ADDED if isinstance(each := content.get(key), dict | list))
        if words > MOST_WORDS or added > MOST_ADDED:
            raise ArtifactError(f"{path / name}: {words} words and {added} added tokens; at most {MOST_WORDS} and {MOST_ADDED} are read")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory, read from its own files alone. Raises ArtifactError where there is none, or a broken one."""
    import transformers

    if not _has_tokenizer(path):
        raise ArtifactError(f"{path} has no tokenizer")
    _check_size(path)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it remarks on the class name that ONNX Runtime GenAI wants
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json can raise nearly anything
        raise ArtifactError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
