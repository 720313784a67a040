"""Train an FFBA adapter on SmolLM2 with transformers' Trainer, on a CPU, for arithmetic word problems.

    python examples/01_train_ffba/train.py --base models/smollm2 --output examples/01_train_ffba/adapter

The adapter in `adapter/` beside this file was made by exactly this command; `adapter/training.json` tells on what, with its scores.

    python examples/01_train_ffba/train.py --base models/smollm2 --output examples/01_train_ffba/adapter_mlp --target-modules mlp --rank 12

made the one in `adapter_mlp/`: branches beside the MLPs alone, which `--backend hf` can write as a plain Hugging Face checkpoint. And

    python examples/01_train_ffba/train.py --base models/smollm2 --output facts --answers facts --target-modules mlp --steps 80

made examples/07_bank/facts, which does something else with the same questions: it answers with what they state, as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from problems import Problem, problems, result_of, with_facts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import flora_export.ffba

MAX_NEW_TOKENS = 128  # room for an untrained model's longer answer
IGNORED = -100  # label of a token that the loss leaves out: the prompt and the padding


def encode(tokenizer: Any, problem: Problem) -> dict[str, list[int]]:
    """One problem as token ids; the loss sees the answer alone."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(problem.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row. Returns [batch, tokens] tensors."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORED) for row in rows]),
    }


@torch.no_grad()
def exact(model: Any, tokenizer: Any, held_out: list[Problem], batch: int = 20) -> float:
    """Share of held-out problems whose stated result, or else whose whole answer, is right, decoding greedily."""
    right = 0
    model.eval()
    tokenizer.padding_side = "left"
    for start in range(0, len(held_out), batch):
        part = held_out[start : start + batch]
        chats = [[{"role": "user", "content": problem.question}] for problem in part]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            text == problem.answer if problem.answer.startswith("{") else result_of(text) == problem.result
            for text, problem in zip(texts, part, strict=True)
        )
    return right / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2 directory, from examples/00_get_smollm2.py")
    parser.add_argument("--output", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", nargs="+", default=["self_attn", "mlp"], help="the blocks that get a branch")
    parser.add_argument("--answers", choices=["working", "facts"], default="working", help="what it learns to answer")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=100, help="problems for the scores before and after; 0 skips them")
    options = parser.parse_args()

    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    config = flora_export.ffba.FFBAConfig(
        r=options.rank,
        alpha=4.0 * options.rank,
        target_modules=options.target_modules,
        init_ffba_weights="kaiming",  # this and the next: what the adapters beside this file were made with, not what is best
        gated_gain=1.0,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()

    answered = with_facts if options.answers == "facts" else lambda problem: problem
    held_out = [answered(problem) for problem in problems(options.held_out, test=True, seed=1)]
    before = exact(model, tokenizer, held_out) if held_out else None
    train = [encode(tokenizer, answered(problem)) for problem in problems(options.steps * options.batch, test=False, seed=0)]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),  # nothing is saved there
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        weight_decay=0.0,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    started = time.perf_counter()
    Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate).train()
    seconds = time.perf_counter() - started
    after = exact(model, tokenizer, held_out) if held_out else None

    model.save_pretrained(options.output)
    record = {
        "command": f"python examples/01_train_ffba/train.py --base models/smollm2 --output {options.output} --steps {options.steps} "
        f"--batch {options.batch} --rank {options.rank} --learning-rate {options.learning_rate} "
        f"--target-modules {' '.join(options.target_modules)}" + (" --answers facts" if options.answers == "facts" else ""),
        "held_out_problems": options.held_out,
        "exact_before": before,
        "exact_after": after,
        "training_seconds": round(seconds),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.output / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
