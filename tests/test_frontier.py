"""The frontier of accuracy and latency: its statistics, what it chooses by, its branches in other places, and all of it at tiny size."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy.analysis import Scores, contrast
from benchmarks.accuracy.frontier import PRESETS, RESULTS, TUNING_SEED, Frontier, chosen, judge, named, resume, tune
from benchmarks.accuracy.frontier_report import advice, markdown, plot, summarise, validation_table
from benchmarks.accuracy.kept import elsewhere
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.placements import place
from benchmarks.accuracy.presets import PRESETS as AT_ONE_BUDGET
from benchmarks.accuracy.presets import Preset
from benchmarks.accuracy.runs import RECORD
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Fit, load_base, train

COUNTS = {"arithmetic": 4, "lexical": 4, "dialogue": 4}
TINY = Frontier(
    arms=(("ffba-mlp", 4), ("ffba", 2), ("lora", 1)),
    rates=(1e-3, 1e-2),
    scales=(0.5,),
    seeds=(0, 1),
    steps=2,
    batch=COUNTS,
    validation=COUNTS,
    test=COUNTS,
    workers=2,
    threads=1,
    rounds=1,
)


def drawn(rng: np.random.Generator, shift: float) -> list[Scores]:
    """Three tasks' scores of four seeds, which differ by seed and by example."""
    return [rng.normal(shift, 0.2, (4, 60)) + rng.normal(0, 0.03, (4, 1)) + rng.normal(0, 0.2, (1, 60)) for _ in TASKS]


def test_a_contrast_is_right_by_chance_as_often_as_it_says() -> None:
    """Of equal methods 5 in 100 differ with p < 0.05; of a true difference of the size that it names it finds 80 in 100."""
    rng = np.random.default_rng(0)
    same = [contrast(drawn(rng, 0), drawn(rng, 0)) for _ in range(400)]
    assert 0.02 < np.mean([found["p"] < 0.05 for found in same]) < 0.08
    size = float(np.mean([found["detectable"] for found in same]))  # type: ignore[misc]
    apart = [contrast(drawn(rng, size), drawn(rng, 0)) for _ in range(400)]
    assert 0.7 < np.mean([found["p"] < 0.05 for found in apart]) < 0.9
    assert np.mean([low < size < high for low, high in (found["interval"] for found in apart)]) > 0.9  # type: ignore[misc]


def test_a_contrast_of_equal_scores_and_of_one_seed() -> None:
    scores = drawn(np.random.default_rng(0), 0)
    assert contrast(scores, scores) == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0, "detectable": 0.0}
    one = [matrix[:1] for matrix in scores]
    shifted = contrast([matrix + np.random.default_rng(1).normal(0.5, 0.1, matrix.shape) for matrix in one], one)
    assert shifted["p"] < 0.01  # type: ignore[operator]


def test_presets_have_the_arms_that_their_report_needs() -> None:
    for preset in (preset for preset in PRESETS.values() if preset.test):
        assert {METHODS[method].merges for method, _ in preset.arms} == {True, False}
        assert len(preset.seeds) >= 3
    again, first = PRESETS["confirm"], PRESETS["small"]
    assert not {*again.seeds} & {*first.seeds, TUNING_SEED}
    assert len(again.seeds) >= 5
    assert PRESETS["full"].steps >= 300
    assert len(PRESETS["full"].seeds) >= 5


@pytest.mark.parametrize("placement", ["next", "carried"])
def test_a_branch_elsewhere_starts_as_the_base_reads_where_it_says_and_learns(tiny_smollm2: Path, placement: str) -> None:
    model, _ = load_base(tiny_smollm2)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        alone = model(ids).logits
        place(model, placement, METHODS[placement].config(4, 4, 1.0))  # type: ignore[misc]
        assert torch.equal(model(ids).logits, alone)  # B is zero
        layers, carriers = model.model.layers, model.carriers
        assert len(carriers) == 2 * len(layers) - 1  # no block follows the last
        seen: dict[str, Any] = {}
        read = {"next": ("q_proj", "gate_proj"), "carried": ("o_proj", "down_proj")}[placement]
        for key, module in (("attention", getattr(layers[0].self_attn, read[0])), ("mlp", getattr(layers[0].mlp, read[1]))):
            module.register_forward_pre_hook(lambda _, inputs, key=key: seen.update({key: inputs[0]}))
        for name, writer in (("up", layers[0].mlp.up_proj), ("key", layers[1].self_attn.k_proj)):
            writer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (module, inputs[0], output)}))
        for carrier in carriers:
            for matrix in carrier.B:
                matrix.weight.normal_()
        assert not torch.allclose(model(ids).logits, alone)
        for carrier, source, sink, place_of in ((carriers[0], "attention", "up", 1), (carriers[1], "mlp", "key", 1)):
            module, x, output = seen[sink]
            expected = module.forward(x) + carrier.B[place_of](carrier.A(seen[source]))
            torch.testing.assert_close(output, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("carriers.") for name in trained)
    losses = [train(Fit(placement, "lexical", 3e-2, 0, steps, 8, rank=8), tiny_smollm2, 16)[2]["validation_loss"] for steps in (1, 12)]
    assert losses[1] < losses[0] - 0.01


def test_placements_are_compared_on_validation_alone(tiny_smollm2: Path, tmp_path: Path) -> None:
    preset = replace(TINY, arms=(("ffba", 2), ("next", 2)), rates=(1e-3,), scales=(), seeds=(0, 1, 2), test={})
    result = judge(preset, tune(preset, tiny_smollm2, tmp_path)["chosen"], tiny_smollm2, tmp_path)
    assert "latency" not in result
    assert len(result["runs"]) == 2 * 3 * 3
    first, second = validation_table(result["runs"], "ffba 2")[2:]
    assert first.endswith("| 1.000 |")
    assert ", p = " in second


def test_a_lower_loss_of_every_seed_shows() -> None:
    rng = np.random.default_rng(0)
    runs = [
        {
            "fit": {"method": method, "rank": 2, "task": task, "seed": seed},
            "trainable": 10,
            "validation_loss": loss * rng.uniform(0.99, 1.01),
        }
        for method, factor in (("ffba", 1.0), ("next", 0.8), ("carried", 1.0))
        for task, loss in zip(TASKS, (0.2 * factor, 1.2 * factor, 0.2 * factor), strict=True)
        for seed in range(5)
    ]
    better, same = validation_table(runs, "ffba 2")[3:]
    assert "| 0.8" in better
    found_better, found_same = (float(line.partition("p = ")[2].partition(")")[0]) for line in (better, same))
    assert found_better < 0.001
    assert found_same > 0.05


def test_where_runs_were_made_is_remembered(tmp_path: Path) -> None:
    b, c, d = ({"cpu": cpu} for cpu in "bcd")
    assert elsewhere(tmp_path, []) == []
    assert elsewhere(tmp_path, [b, c, b]) == [b, c]
    assert elsewhere(tmp_path, []) == [b, c]
    assert elsewhere(tmp_path, [d, c]) == [b, c, d]


def arm(method: str, decode: float, validation: float, mean: float) -> dict[str, Any]:
    cost = {precision: {metric: [decode, decode, decode] for metric in ("tpot", "ttft")} for precision in ("fp32", "int4")}
    return {"label": f"{method} at {decode}", "method": method, "validation": validation, "mean": mean, "cost": cost}


def test_the_advice_is_the_cheapest_that_is_measured_to_score_as_the_best() -> None:
    """Too little power to see a difference is no reason to recommend an arm."""
    rng = np.random.default_rng(0)
    good, poor = drawn(rng, 0.5), drawn(rng, 0)
    arms = {"a": arm("ffba", 1.01, 0.3, 0.0), "b": arm("ffba", 1.05, 0.2, 0.5), "c": arm("lora", 1.2, 0.1, 0.5)}
    alike, coarse = ([matrix + rng.normal(0, noise, matrix.shape) for matrix in good] for noise in (0.05, 0.5))
    assert contrast(coarse, good)["p"] > 0.05  # type: ignore[operator]
    assert "take ffba at 1.05:" in advice(arms, {"a": poor, "b": alike, "c": good})
    assert "take ffba at 1.01:" in advice(arms, {"a": alike, "b": alike, "c": good})
    assert "take lora at 1.2:" in advice(arms, {"a": poor, "b": poor, "c": good})
    assert "take lora at 1.2:" in advice(arms, {"a": poor, "b": coarse, "c": good})
    assert "Cheaper, but not shown to score within 0.02 of the best: ffba at 1.01 at 1.010, -0.5" in advice(
        arms, {"a": poor, "b": coarse, "c": good}
    )


@pytest.mark.parametrize(
    "preset", [*PRESETS.values(), *AT_ONE_BUDGET.values()], ids=[*PRESETS, *(f"one-budget-{name}" for name in AT_ONE_BUDGET)]
)
def test_a_preset_asks_for_no_more_examples_than_there_are(preset: Frontier | Preset) -> None:
    for name, task in TASKS.items():
        for split, count in (
            ("train", preset.steps * preset.batch[name]),
            ("validation", preset.validation[name]),
            ("test", preset.test.get(name, 0)),
        ):
            assert len(task.examples(split, count, 0)) == count


@pytest.mark.parametrize("result", sorted(RESULTS.glob("frontier-*.json")), ids=lambda path: path.stem)
def test_what_a_result_says_is_what_its_runs_give(result: Path) -> None:
    written = json.loads(result.read_text())
    if "summary" in written:
        assert summarise(written) == written["summary"]
        assert markdown(written["summary"]) == written["table"]
    elif "table" in written:
        assert validation_table(written["runs"], named(written["preset"]["arms"][0])) == written["table"]
    else:
        assert chosen(written["tried"], [tuple(arm) for arm in written["preset"]["arms"]]) == written["chosen"]


def test_the_whole_frontier(tiny_smollm2: Path, tmp_path: Path) -> None:
    """Chosen by validation, judged by test, timed; a second call reads what the first has kept."""
    work = tmp_path / "work"
    tuned = tune(TINY, tiny_smollm2, work)
    assert len(tuned["tried"]) > 3 * 3 * (2 + 1)  # the best of two rates is an end of them
    for name, tasks in tuned["chosen"].items():
        for task, (rate, scale) in tasks.items():
            cell = [r for r in tuned["tried"] if (f"{r['fit']['method']} {r['fit']['rank']}", r["fit"]["task"]) == (name, task)]
            best = min(cell, key=lambda record: record["validation_loss"])["fit"]
            assert (rate, scale) == (best["learning_rate"], best["scale"])
            rates = [record["fit"]["learning_rate"] for record in cell]
            assert min(rates) < rate < max(rates)
    result = judge(TINY, tuned["chosen"], tiny_smollm2, work)
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    assert judge(TINY, tuned["chosen"], tiny_smollm2, work) == result
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.json")} == kept
    assert any(path.name == RECORD for path in kept)

    made = {"made_with": {"code": "a"}, "environment": {"cpu": "b"}, "resumed": [{"cpu": "c"}], "preset": asdict(TINY)}
    another = tmp_path / "another"
    for file, written in ((tmp_path / "tuning.json", tuned), (tmp_path / "result.json", result)):
        file.write_text(json.dumps(made | written))
        assert resume(file, {"code": "a"}, another) == [{"cpu": "b"}, {"cpu": "c"}]
        with pytest.raises(ValueError, match="made with another code"):
            resume(file, {"code": "d"}, another)
    assert {path.parent.name for path in another.rglob(RECORD)} == {path.parent.name for path in kept if path.parent.parent == work}
    assert tune(TINY, tiny_smollm2, another) == tuned  # the seconds too: nothing has run again

    table = summarise(result)
    assert table["base"].keys() == TASKS.keys()
    assert list(table["arms"]) == ["ffba-mlp 4", "ffba 2", "lora 1"]
    found = table["contrasts"]["best of each"]
    assert found["theirs"] == "lora 1"
    validation = {name: table["arms"][name]["validation"] for name in ("ffba-mlp 4", "ffba 2")}
    assert found["ours"] == min(validation, key=lambda name: validation[name])
    assert "power: it finds a true difference of" in found["said"]
    lines = markdown(table)
    assert len(lines) == 2 + 1 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert any(table["arms"][name]["label"] in table["advice"] for name in table["arms"])
    json.dumps(table)
    plot(table, tmp_path / "plot.svg")
    assert "FFBA" in (tmp_path / "plot.svg").read_text()
