"""The score of a model on held-out examples: it chooses between answers, or writes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.accuracy.tasks import Example, Task

BATCH = {"cpu": 50, "cuda": 250}


@torch.no_grad()
def scores(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example]) -> list[float]:
    """One score of 0 to 1 for each example, in order."""
    model.eval()
    answers: list[str] = []
    batch = BATCH[model.device.type]
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [example.prompt for example in part]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        if task.max_new_tokens:
            answers += _written(model, tokenizer, inputs, task.max_new_tokens)
        else:
            answers += _chosen(model, tokenizer, inputs, part)
    return [task.score(answer, example) for answer, example in zip(answers, examples, strict=True)]


def _written(model: Any, tokenizer: Any, inputs: Any, limit: int) -> list[str]:
    """What the model writes, greedily."""
    output = model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _chosen(model: Any, tokenizer: Any, inputs: Any, examples: Sequence[Example]) -> list[str]:
    """The likeliest of each example's choices, which differ in their first token."""
    logits = model(**inputs, logits_to_keep=1).logits[:, -1]  # [batch, vocabulary]
    picked = []
    for row, example in zip(logits, examples, strict=True):
        firsts = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in example.choices]
        if len(set(firsts)) < len(firsts):
            raise ValueError(f"{example.choices}: two of them start with the same token, so the first token cannot tell them apart")
        picked.append(example.choices[int(row[firsts].argmax())])
    return picked
