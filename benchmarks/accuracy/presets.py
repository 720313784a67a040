"""How much is trained: the shape of the result in under 45 minutes on two cores; what FFBA's defaults bring; all of it, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.accuracy.methods import ABLATIONS, COMPARED


@dataclass(frozen=True)
class Preset:
    methods: tuple[str, ...]
    learning_rates: tuple[float, ...]  # the sweep, on validation
    seeds: tuple[int, ...]
    steps: int
    batch: dict[str, int]  # of each task: examples of lexical are a tenth as long as those of dialogue
    validation: dict[str, int]
    test: dict[str, int]  # empty: the sweep is all
    workers: int  # processes at a time
    threads: int  # of each process
    rounds: int  # of the latency benchmark
    rank: int = 8  # of the LoRA that sets the budget
    sweep_seeds: tuple[int, ...] = (0,)


SMALL = Preset(
    methods=("base", "lora", "ffba"),
    learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
    seeds=(0, 1, 2),
    steps=40,
    batch={"arithmetic": 4, "lexical": 16, "dialogue": 4},
    validation={"arithmetic": 48, "lexical": 300, "dialogue": 48},
    test={"arithmetic": 100, "lexical": 700, "dialogue": 50},
    workers=2,
    threads=1,
    rounds=60,
)

PRESETS = {
    "small": SMALL,
    "ablation": replace(SMALL, methods=("lora", "ffba", *ABLATIONS, "ffba-mlp"), learning_rates=(3e-3, 6e-3), test={}),
    "full": Preset(
        methods=tuple(COMPARED),
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        seeds=(0, 1, 2),
        steps=200,
        batch={"arithmetic": 16, "lexical": 12, "dialogue": 16},
        validation={"arithmetic": 200, "lexical": 350, "dialogue": 200},
        test={"arithmetic": 500, "lexical": 750, "dialogue": 500},
        workers=8,
        threads=2,
        rounds=150,
    ),
}
