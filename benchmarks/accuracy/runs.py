"""Runs, several at a time and each kept on disk, so that what was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.training import Fit

RECORD = "record.json"
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Run:
    """A fit, and how many held-out examples it is judged by: validation for the sweep; with `test` above 0, the test as well."""

    fit: Fit
    validation: int
    test: int = 0

    @property
    def name(self) -> str:
        return f"{self.fit.name}-{self.validation}-{self.test}"


def run_all(runs: Sequence[Run], base: Path, work: Path, workers: int, threads: int) -> list[dict[str, Any]]:
    """The record of each run, in order; those that are in `work` already are read from there."""
    todo = [run for run in dict.fromkeys(runs) if not (work / run.name / RECORD).is_file()]
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (threads,)) as pool:
        futures = [pool.submit(_run, run, base, work) for run in todo]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                record = future.result()
                minutes = (time.perf_counter() - started) / 60
                print(f"{done}/{len(todo)} after {minutes:.1f} min: {_brief(record)}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the error now, not after all that waits
            raise
    return [json.loads((work / run.name / RECORD).read_text()) for run in runs]


def _start(threads: int) -> None:
    """Set up a process. It sees one GPU: with more, Trainer would multiply the batch by their number."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    import torch

    torch.set_num_threads(threads)


def _run(run: Run, base: Path, work: Path) -> dict[str, Any]:
    """Train, or load what an earlier run of the same fit has trained; judge; keep."""
    import peft
    import torch

    from benchmarks.accuracy.methods import METHODS
    from benchmarks.accuracy.scoring import scores
    from benchmarks.accuracy.tasks import TASKS
    from benchmarks.accuracy.training import load_base, train

    fit = run.fit
    adapter = work / ADAPTERS / fit.name
    record: dict[str, Any] = {"fit": asdict(fit)}
    started = time.perf_counter()
    if (adapter / RECORD).is_file():
        model, tokenizer = load_base(base)
        model = peft.PeftModel.from_pretrained(model, adapter)
        record |= json.loads((adapter / RECORD).read_text())
    elif not METHODS[fit.method].trains:
        model, tokenizer = load_base(base)
    else:
        model, tokenizer, trained = train(fit, base, run.validation)
        trained["train_seconds"] = round(time.perf_counter() - started, 1)
        record |= trained
        if isinstance(model, peft.PeftModel):
            model.save_pretrained(adapter)
            (adapter / RECORD).write_text(json.dumps(trained))
    if run.test:
        task = TASKS[fit.task]
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        record["scores"] = [round(score, 4) for score in scores(model, tokenizer, task, task.examples("test", run.test, 0))]
    record["seconds"] = round(time.perf_counter() - started, 1)
    keep(run, record, work)
    return record


def keep(run: Run, record: dict[str, Any], work: Path) -> None:
    """Write a run's record, whole or not at all. One that is kept already stays."""
    place = work / run.name
    if place.exists():
        return
    unfinished = place.with_name(place.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / RECORD).write_text(json.dumps(record))
    unfinished.rename(place)


def loss(record: dict[str, Any]) -> float:
    """A run's loss on validation; infinite where training diverged, so that it is nobody's best."""
    value = float(record["validation_loss"])
    return value if math.isfinite(value) else math.inf


def _brief(record: dict[str, Any]) -> str:
    fit = record["fit"]
    parts = [fit["method"], fit["task"], f"rate {fit['learning_rate']:g}", f"seed {fit['seed']}"]
    if "validation_loss" in record:
        parts.append(f"validation loss {record['validation_loss']:.4f}")
    if "scores" in record:
        parts.append(f"test {sum(record['scores']) / len(record['scores']):.3f}")
    return ", ".join([*parts, f"{record['seconds']:.0f} s"])
