"""Three adapters in one artifact: three questions in one batch, each answered by its own; then one is replaced while others ask.

    python examples/07_bank/bank.py --base models/smollm2 --output out/bank

`working` and `working-mlp` solve a word problem step by step, `facts` (in `facts/` beside this file, with how it was trained) lists what
the problem states, as JSON. The artifact is an ordinary one, for `flora-export generate out/bank "..." --adapter facts` as well. Further
options are those of `flora-export build`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from flora_export.generate import end_tokens
from flora_export.runtime import Session
from flora_export.verify.prompts import load_tokenizer

EXAMPLES = Path(__file__).parent.parent
ADAPTERS = {
    "working": EXAMPLES / "01_train_ffba" / "adapter",
    "working-mlp": EXAMPLES / "01_train_ffba" / "adapter_mlp",
    "facts": EXAMPLES / "07_bank" / "facts",
}
QUESTIONS = {
    "working": "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?",
    "working-mlp": "There are 3 bags with 6 coins in each. Emma takes 4 coins out. How many coins are left in the bags?",
    "facts": "Hugo had 41 stamps, gave 12 to Lena and sold 8. How many stamps does Hugo still have?",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=20)
    options, more = parser.parse_known_args()
    if not options.output.exists():
        build(options.base, options.output, more)
    session = Session(options.output)
    print("-- one batch, each question to its own adapter")
    for name, answer in zip(QUESTIONS, ask(session, list(QUESTIONS), list(QUESTIONS.values())), strict=True):
        print(f"\n[{name}] {QUESTIONS[name]}\n{answer}")
    swap_under_load(session, options.swaps)


def build(base: Path, output: Path, more: list[str]) -> None:
    """One artifact of all three, with a place that is filled later; verified as any other."""
    names = [word for name in ADAPTERS for word in ("--name", name)]
    command = [Path(sys.executable).with_name("flora-export"), "build", *ADAPTERS.values(), *names, "--slots", "4"]
    subprocess.run([*command, "--base", base, "--backend", "onnxruntime", "--output", output, *more], check=True)


def ask(session: Session, adapters: list[str], questions: list[str], most: int = 64) -> list[str]:
    """Greedy answers of one batch."""
    tokenizer, artifact = load_tokenizer(session.artifact.path), session.artifact
    ends = end_tokens(artifact, {})
    prompts = []
    for question in questions:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        prompts.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    answers: list[list[int]] = [[] for _ in prompts]
    with session.request(adapters) as decoder:
        tokens = [int(logits[-1].argmax()) for logits in decoder.start(prompts)]
        running = set(range(len(prompts)))
        while running and len(max(answers, key=len)) < most:
            running -= {row for row in running if tokens[row] in ends}
            for row in running:
                answers[row].append(tokens[row])
            tokens = [int(token) for token in decoder.step(tokens).argmax(-1)]
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def swap_under_load(session: Session, swaps: int) -> None:
    """Two clients ask `working-mlp`, while that name is given to `facts` and back: each answer is wholly one or the other's.

    The next swap comes when three more requests have ended, however slow the machine: two were under way, so one began after the swap.
    """
    question = QUESTIONS["facts"]
    right = {ask(session, [name], [question])[0] for name in ("facts", "working-mlp")}
    answers: list[str] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers.extend(ask(session, ["working-mlp"], [question]))
            except Exception as error:  # none may come
                errors.append(error)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for each in clients:
        each.start()
    seconds = []
    for index in range(swaps):
        started = time.perf_counter()
        session.swap("working-mlp", ADAPTERS["facts" if index % 2 == 0 else "working-mlp"])
        seconds.append(time.perf_counter() - started)
        ended = len(answers) + len(errors)
        while len(answers) + len(errors) < ended + len(clients) + 1:
            time.sleep(0.01)
    stop.set()
    for each in clients:
        each.join()
    print(f"\n-- {swaps} swaps under load, {statistics.median(seconds) * 1000:.0f} ms each (median, beside the load)")
    wrong = sum(answer not in right for answer in answers)
    print(f"{len(answers) + len(errors)} requests: {len(errors)} errors, {wrong} wrong answers")
    if errors or set(answers) != right:
        raise SystemExit(f"{errors[:1]} {Counter(answers)}")


if __name__ == "__main__":
    main()
