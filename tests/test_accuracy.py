"""The accuracy benchmark, on a tiny random model with SmolLM2's tokenizer: equal budgets, a fair sweep, the table, the plot."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy.analysis import paired, pareto, summary
from benchmarks.accuracy.experiment import best_rates, experiment
from benchmarks.accuracy.kept import FILE, claim
from benchmarks.accuracy.methods import METHODS, TOLERANCE, budget_of, fitted
from benchmarks.accuracy.presets import PRESETS, Preset
from benchmarks.accuracy.report import markdown, plot, summarise, sweep_table
from benchmarks.accuracy.runs import RECORD
from benchmarks.accuracy.scoring import scores
from benchmarks.accuracy.tasks import TASKS, Example
from benchmarks.accuracy.training import Fit, collate, encode, load_base, train

TRAINED = [name for name, method in METHODS.items() if method.config and not method.placement]
COUNTS = {"arithmetic": 4, "lexical": 4, "dialogue": 4}
TINY = Preset(
    methods=("base", "lora", "ffba"),
    learning_rates=(1e-4, 1e-2),
    seeds=(0, 1),
    steps=2,
    batch=COUNTS,
    validation=COUNTS,
    test=COUNTS,
    workers=2,
    threads=1,
    rounds=3,
)


@pytest.mark.real
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_budgets_are_equal(smollm2: Path, preset: Preset) -> None:
    budget = budget_of(smollm2, preset.rank)
    for name in TRAINED:
        _, count = fitted(METHODS[name], smollm2, budget)
        assert abs(count / budget - 1) <= TOLERANCE, name


def test_a_budget_that_no_rank_meets_is_refused(tiny_smollm2: Path) -> None:
    with pytest.raises(ValueError, match="no rank near 1 has 10 trainable numbers"):
        fitted(METHODS["ffba"], tiny_smollm2, 10)


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_trains_what_its_budget_counts_and_learns(tiny_smollm2: Path, name: str) -> None:
    budget = budget_of(tiny_smollm2, 9)
    fit = Fit(name, "lexical", 1e-2, seed=0, steps=1, batch=8, budget=budget)
    model, _, before = train(fit, tiny_smollm2, validation=16)
    assert (
        before["trainable"]
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        == fitted(METHODS[name], tiny_smollm2, budget)[1]
    )
    _, _, after = train(dataclasses.replace(fit, steps=12), tiny_smollm2, validation=16)
    assert after["validation_loss"] < before["validation_loss"] - 0.02


def test_the_loss_is_of_the_answers_alone(tiny_smollm2: Path) -> None:
    """The kept logits and their labels give the loss that the whole unpadded sequences give."""
    model, tokenizer = load_base(tiny_smollm2)
    rows = [encode(tokenizer, example) for example in TASKS["arithmetic"].examples("train", 3, 0)]
    batch = collate(rows)
    with torch.no_grad():
        loss = model(**batch).loss
        total, count = 0.0, 0
        for row in rows:
            ids, answer = torch.tensor([row["prompt"] + row["answer"]]), len(row["answer"])
            logits = model(ids).logits[0, -answer - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["answer"]), reduction="sum").item()
            count += answer
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_scores_choose_and_write(tiny_smollm2: Path) -> None:
    model, tokenizer = load_base(tiny_smollm2)
    for task in TASKS.values():
        examples = task.examples("test", 5, 0)
        assert len(scores(model, tokenizer, task, examples)) == 5
    lexical = TASKS["lexical"]
    example = lexical.examples("test", 1, 0)[0]
    bias = torch.zeros(model.config.vocab_size)
    bias[tokenizer(example.answer)["input_ids"][0]] = 1e4
    hook = model.lm_head.register_forward_hook(lambda *args: args[-1] + bias)
    assert scores(model, tokenizer, lexical, [example]) == [1.0]
    hook.remove()
    alike = Example("A cat is a kind of", " animal one", (" animal one", " animal two"))
    with pytest.raises(ValueError, match="start with the same token"):
        scores(model, tokenizer, lexical, [alike])


def test_the_rate_with_the_lowest_validation_loss_is_chosen() -> None:
    fits = [("lora", "lexical", 1e-3, 0.5), ("lora", "lexical", 2e-3, 0.4), ("ffba", "lexical", 1e-3, 0.1), ("ffba", "lexical", 2e-3, 0.2)]
    fits = [*((method, task, 1.0, math.nan) for method, task, *_ in fits), *fits]  # training diverged
    sweep = [{"fit": {"method": m, "task": t, "learning_rate": rate}, "validation_loss": loss} for m, t, rate, loss in fits]
    assert best_rates(sweep) == {("lora", "lexical"): 2e-3, ("ffba", "lexical"): 1e-3}


def test_a_paired_difference_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 2, (3, 300)).astype(float)
    better = np.where(rng.random((3, 300)) < 0.3, 1.0, theirs)
    found, none = paired(better, theirs), paired(rng.permuted(theirs, axis=1), theirs)
    assert found["p"] < 0.01 < none["p"]
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high
    assert paired(theirs, theirs) == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    assert summary(theirs)["mean"] == pytest.approx(theirs.mean(), abs=1e-4)


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto({"a": (1.0, 0.5), "b": (1.0, 0.6), "c": (1.1, 0.6), "d": (1.2, 0.9)}) == ["b", "d"]


def test_the_whole_comparison(tiny_smollm2: Path, tmp_path: Path) -> None:
    """Sweep, seeds, latency, table and plot; a second call reads what the first has kept."""
    result = experiment(TINY, TINY.methods, tiny_smollm2, tmp_path / "work")
    assert len(result["sweep"]) == 2 * 3 * 2
    assert [run["fit"]["seed"] for run in result["runs"] if run["fit"]["method"] == "base"] == [0, 0, 0]
    for run in result["runs"]:
        fit = run["fit"]
        assert len(run["scores"]) == TINY.test[fit["task"]]
        if fit["method"] != "base":
            losses = {each["validation_loss"]: each["fit"]["learning_rate"] for each in result["sweep"] if same_cell(each["fit"], fit)}
            assert fit["learning_rate"] == losses[min(losses)]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob(RECORD)}
    again = experiment(TINY, TINY.methods, tiny_smollm2, tmp_path / "work")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob(RECORD)} == kept
    assert again["runs"] == result["runs"]

    table = summarise(result)
    ours = table["methods"]["ffba"]
    assert set(ours["against_lora"]) == set(TASKS)
    assert list(ours["tpot"]) == ["fused"]
    assert list(table["methods"]["lora"]["tpot"]) == ["unmerged", "merged"]
    lines = markdown(table).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    json.dumps(table)
    plot(table, tmp_path / "plot.svg")
    assert "FFBA" in (tmp_path / "plot.svg").read_text()


def test_a_sweep_alone(tiny_smollm2: Path, tmp_path: Path) -> None:
    preset = dataclasses.replace(TINY, methods=("ffba",), test={}, sweep_seeds=(0, 1))
    result = experiment(preset, preset.methods, tiny_smollm2, tmp_path)
    assert "runs" not in result
    assert len(result["sweep"]) == 2 * 3 * 2
    cell = [run for run in result["sweep"] if run["fit"]["task"] == "lexical"]
    means = {rate: np.mean([run["validation_loss"] for run in cell if run["fit"]["learning_rate"] == rate]) for rate in TINY.learning_rates}
    best = min(means, key=lambda rate: means[rate])
    assert result["learning_rates"]["ffba lexical"] == best
    (row,) = sweep_table(result).splitlines()[2:]
    assert f"{means[best]:.3f} ± " in row


def same_cell(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["method"], one["task"]) == (other["method"], other["task"])


def test_runs_of_another_base_or_program_are_not_taken(tiny_smollm2: Path, tmp_path: Path) -> None:
    """Else a changed method, or another model of the same shape, would be shown with the numbers of the old one."""
    work = tmp_path / "work"
    assert claim(work, tiny_smollm2) == claim(work, tiny_smollm2) == json.loads((work / FILE).read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny_smollm2, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match=r"work holds runs made with another base: remove it, or choose another directory by --work"):
        claim(work, other)
    (work / FILE).write_text(json.dumps(claim(work, tiny_smollm2) | {"code": "0", "device": "abacus"}))
    with pytest.raises(ValueError, match="another device and code"):
        claim(work, tiny_smollm2)
