"""The tokenizer as OpenVINO graphs, so that a C++ host needs no other library: text in, ids out, and back."""

from __future__ import annotations

from pathlib import Path

import openvino as ov
from openvino_tokenizers import convert_tokenizer

from flora_export.backends.openvino.convert import name_nodes
from flora_export.quiet import quiet

NAMES = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")


def write_tokenizer(directory: Path) -> str:
    """Convert the tokenizer that is in a directory, beside it. Returns why there is none, or nothing."""
    if not (directory / "tokenizer.json").is_file():
        return "the base model has no tokenizer.json"
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # neither library documents its error types
        return f"openvino_tokenizers refuses it ({type(error).__name__}: {error})"
    for name, model in zip(NAMES, models, strict=True):
        name_nodes(model)
        ov.save_model(model, directory / name, compress_to_fp16=False)
    return ""
