"""One fine-tuning, with transformers' Trainer and PEFT as they are: the base model, a method, a task, a learning rate, a seed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from benchmarks.accuracy.methods import METHODS, configured
from benchmarks.accuracy.placements import place
from benchmarks.accuracy.tasks import TASKS, Example

IGNORED = -100  # label of a token that the loss leaves out: the prompt and the padding


@dataclass(frozen=True)
class Fit:
    """What is trained, and on what."""

    method: str
    task: str
    learning_rate: float
    seed: int
    steps: int
    batch: int
    budget: int = 0  # trainable numbers, which decide the rank; 0: the rank is given
    rank: int = 0
    scale: float = 1.0  # factor on the method's own alpha

    @property
    def name(self) -> str:
        size = f"{self.budget}" if self.budget else f"r{self.rank}-x{self.scale:g}"
        return f"{self.method}-{self.task}-{self.learning_rate:g}-{self.seed}-{self.steps}x{self.batch}-{size}"


def load_base(base: Path) -> tuple[Any, Any]:
    """Model in fp32 and tokenizer. Padding goes to the left, so that all answers of a batch end at the same place."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # The last tokens of a batch are no contiguous tensor: torch would multiply each row of it with a copy of the head of its own.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model, tokenizer


def encode(tokenizer: Any, example: Example) -> dict[str, list[int]]:
    """Prompt and answer, with the token that ends it, as ids."""
    return {
        "prompt": tokenizer(example.prompt, add_special_tokens=False)["input_ids"],
        "answer": tokenizer(example.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"],
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Pad on the left: ids and mask [batch, tokens]. Logits and labels are for the last `logits_to_keep` tokens, which hold all answers."""
    longest = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
    keep = max(len(row["answer"]) for row in rows) + 1  # the token before the answer foretells its first

    def padded(values: list[int], filler: int, size: int) -> list[int]:
        return [filler] * (size - len(values)) + values

    whole = [row["prompt"] + row["answer"] for row in rows]
    tensors: dict[str, Tensor | int] = {
        "input_ids": torch.tensor([padded(ids, 0, longest) for ids in whole]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0, longest) for ids in whole]),
        "labels": torch.tensor([padded(row["answer"], IGNORED, keep) for row in rows]),
        "logits_to_keep": keep,
    }
    return tensors


def train(fit: Fit, base: Path, validation: int) -> tuple[Any, Any, dict[str, Any]]:
    """Fine-tune. Returns the model, its tokenizer, and a record with the loss on `validation` examples, in nats per answer token.

    On a CUDA machine it computes in bf16; the weights that are trained stay in fp32.
    """
    transformers.set_seed(fit.seed)
    method, task = METHODS[fit.method], TASKS[fit.task]
    model, tokenizer = load_base(base)
    if method.config is not None:
        config = configured(method, base, fit.budget, fit.rank, fit.scale)
        model = place(model, method.placement, config) if method.placement else peft.get_peft_model(model, config)
    elif not method.trains_base:
        raise ValueError(f"{method.label} trains nothing")
    rows = [encode(tokenizer, example) for example in task.examples("train", fit.steps * fit.batch, fit.seed)]
    held_out = [encode(tokenizer, example) for example in task.examples("validation", validation, 0)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=fit.steps,
            per_device_train_batch_size=fit.batch,
            per_device_eval_batch_size=32,
            learning_rate=fit.learning_rate * method.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, fit.steps // 10),
            weight_decay=0.0,
            seed=fit.seed,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            prediction_loss_only=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
        validation_loss = trainer.evaluate()["eval_loss"]
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # tests are answered in fp32, by every model
    record = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_loss": result.training_loss,
        "validation_loss": validation_loss,
        "train_tokens": sum(len(row["prompt"]) + len(row["answer"]) for row in rows),
    }
    return model, tokenizer, record
