"""Tiny random models of each supported family, and random adapters for them. Head size 16: GroupQueryAttention wants a multiple."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from flora_export.ffba import FFBAConfig

WIDTH, LAYERS, VOCABULARY = 64, 2, 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNEVEN = SHAPE | {"hidden_size": 80}

FAMILIES: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "llama_tied": lambda: tf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),  # QKV bias
    "qwen3": lambda: tf.Qwen3Config(**SHAPE, head_dim=16),  # q and k norms
    "mistral": lambda: tf.MistralConfig(**SHAPE, head_dim=16, sliding_window=8),
    # Gemma multiplies its embeddings by the root of the width: one with few digits would hide a rounding.
    "gemma": lambda: tf.GemmaConfig(**UNEVEN, head_dim=16),
    # Norms after the blocks, soft caps; windows shorter than the prompts, and a scale of attention that is not the head size's.
    "gemma2": lambda: tf.Gemma2Config(**UNEVEN, head_dim=16, query_pre_attn_scalar=24, sliding_window=8),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **UNEVEN, head_dim=16, query_pre_attn_scalar=24, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: tf.Phi3Config(**SHAPE),  # packed QKV, packed gate_up
    "starcoder2": lambda: tf.Starcoder2Config(**SHAPE),  # MLP without gate, with bias
    "starcoder2_relu": lambda: tf.Starcoder2Config(**SHAPE, hidden_act="relu"),
}
GATED_FAMILIES = tuple(name for name in FAMILIES if not name.startswith("starcoder2"))


def make_base(family: str, directory: Path, seed: int = 0) -> Path:
    """Save a random model, its biases and norms random as well: a bias of zero would hide a misplaced one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "bias" not in name and "gemma" not in family else 0.0, std=0.1)
        elif "layers" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, seed: int = 1, **config: Any) -> Path:
    """Save a random adapter, B as random as A."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    defaults = {"r": 4, "alpha": 8.0, "gated_gain": 1.0, "init_ffba_weights": False, "task_type": "CAUSAL_LM"}
    peft.get_peft_model(model, FFBAConfig(**(defaults | config))).save_pretrained(directory)
    return directory


def make_lora(base: Path, directory: Path, seed: int = 1, **config: Any) -> Path:
    """Save a random LoRA as PEFT writes it: B is no zero, DoRA's magnitudes and the modules that are saved whole have moved."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**(defaults | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "trainable_tokens_delta" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif "lora_B" in name or "lora_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def make_speaking_base(directory: Path, seed: int = 0) -> Path:
    """A tiny random Llama with a tokenizer of its own (bytes, and a few merges), a chat template, and a context of 2048."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|a|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the answer is what you say", "the question is what you ask"], trainer)
    torch.manual_seed(seed)
    shape = SHAPE | {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 2048}
    model = AutoModelForCausalLM.from_config(tf.LlamaConfig(**shape))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "layers" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **special).save_pretrained(directory)
    return directory
