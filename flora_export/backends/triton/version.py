"""One version of both models, written in the layout of a repository: the artifact's files, `generate`'s program, warm-up, config.pbtxt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flora_export.artifact import GOLDEN, MANIFEST, REPORT, Artifact, link_or_copy, open_artifact
from flora_export.backends.triton.check import config_faults
from flora_export.backends.triton.config import CONFIG, DECODER, GENERATE, MAIN, Serving, Warmup, decoder_config, describe, generate_config
from flora_export.bank import ADAPTER_IDS, Bank
from flora_export.base_model import file_sha256
from flora_export.errors import ArtifactError, BackendError

HERE = Path(__file__).parent / "program"
WARMUP = "Hello"  # the first question, which the server asks `generate` itself
# Of `generate`: in the version -> in this package.
PROGRAM = {
    MAIN: HERE / "model.py",
    **{f"program/{name}": HERE / name for name in ("__init__.py", "generation.py", "decoding.py", "sampling.py", "scheduler.py")},
}
NO_CACHE = "This file keeps Python from writing here: a server that polls would take it for a change, and load the version again.\n"


def write_version(
    artifact: Artifact, scratch: Path, version: int, models: tuple[str, ...], serving: Serving, former: int | None
) -> Artifact:
    """The models of a version, in the layout of a repository. Returns the decoder's version, which is an artifact itself."""
    decoder, generate = scratch / DECODER / str(version), scratch / GENERATE / str(version)
    decoder.mkdir(parents=True)
    for name in (*artifact.manifest.files, MANIFEST, REPORT):
        if (artifact.path / name).is_file():
            shutil.copyfile(artifact.path / name, decoder / name)
        elif name != REPORT:
            raise ArtifactError(f"{artifact.path}: {name} is missing. Build the artifact again.")
    warmup = _decoder_warmup(artifact, scratch / DECODER / "warmup", version)
    texts = {DECODER: decoder_config(artifact.manifest, version, serving, warmup, former)}
    if GENERATE in models:
        (generate / "program").mkdir(parents=True)
        for file in decoder.iterdir():
            link_or_copy(file, generate / file.name)
        for name, source in PROGRAM.items():
            shutil.copyfile(source, generate / name)
        for directory in (generate, generate / "program"):
            (directory / "__pycache__").write_text(NO_CACHE, encoding="utf-8")
        warmup = _generate_warmup(scratch / GENERATE / "warmup", version, artifact.manifest.bank)
        texts[GENERATE] = generate_config(
            artifact.manifest, version, serving, warmup, {name: file_sha256(generate / name) for name in PROGRAM}
        )
    faults = []
    for model, text in texts.items():
        (scratch / model / str(version) / CONFIG).write_text(text, encoding="utf-8")
        faults += config_faults(scratch / model, artifact.manifest, text)
    if faults:
        raise BackendError(f"the configuration would be wrong: {'; '.join(faults)}")
    return open_artifact(decoder)


def _decoder_warmup(artifact: Artifact, directory: Path, version: int) -> Warmup:
    """A golden prompt as the decoder's first request: prefill, on a KV cache of no tokens."""
    file = artifact.path / GOLDEN
    try:
        with safe_open(file, framework="numpy") as golden:
            ids = golden.get_tensor("prompt.0.input_ids")
            known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(ids))}
            if artifact.manifest.bank is not None:
                known[ADAPTER_IDS] = golden.get_tensor("prompt.0.adapter")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}); an artifact is served only with golden vectors. Build it with verification."
        ) from error
    directory.mkdir()
    files, zeros = {}, {}
    for name, _, dims in map(describe, artifact.manifest.inputs):
        if name in known:
            files[name] = (f"{version}.{name}", [len(known[name])])
            (directory / f"{version}.{name}").write_bytes(known[name].astype("<i8").tobytes())
        else:
            zeros[name] = [max(d, 0) for d in dims]  # [KV heads, 0, head size]
    return Warmup(files, zeros)


def _generate_warmup(directory: Path, version: int, bank: Bank | None) -> Warmup:
    """A question, and one token as its answer; of a bank, its first adapter's.

    A server whose Python cannot read texts fails here, and not at a client's request.
    """
    directory.mkdir()
    contents = {"text_input": _text(WARMUP), "max_tokens": (1).to_bytes(4, "little")}
    if bank is not None:
        contents["adapter"] = _text(next(iter(bank.taken)))
    for name, content in contents.items():
        (directory / f"{version}.{name}").write_bytes(content)
    return Warmup({name: (f"{version}.{name}", [1]) for name in contents}, {})


def _text(text: str) -> bytes:
    """A text as Triton reads it from a file: its length, then its bytes."""
    return len(text.encode()).to_bytes(4, "little") + text.encode()
