"""A tiny random Llama and three random FFBA adapters for it, for a fleet that is done in a minute.

python examples/10_fleet/make_adapters.py out/fleet
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
import transformers

from flora_export.ffba import FFBAConfig

NAMES = ("support", "legal", "maths")


def main(root: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=256, **shape))
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1 and "layers" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    if not (root / "base").exists():
        base.save_pretrained(root / "base")
    for seed, name in enumerate(NAMES):
        if not (root / "adapters" / name).exists():
            torch.manual_seed(seed + 1)
            model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
            config = FFBAConfig(r=4, alpha=8.0, gated_gain=1.0, init_ffba_weights=False, task_type="CAUSAL_LM")
            peft.get_peft_model(model, config).save_pretrained(root / "adapters" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
