"""What the kills and the faults happen to: tiny random models, and what commands make of them."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.campaign.forks import Forks


@dataclass(frozen=True)
class Sources:
    """A base with a tokenizer, another of the same shape, three adapters of FFBA for it, and a pickle of ResLoRA."""

    base: Path
    other_base: Path
    one: Path
    two: Path
    three: Path
    pickle: Path

    def build(self, adapters: list[Path], output: Path, *more: object, backend: str = "onnxruntime") -> list[object]:
        return ["build", *adapters, "--base", self.base, "--backend", backend, "--output", output, *more]


def make_sources(root: Path) -> Sources:
    """Make the models. Torch's threads in this process would take the cores from the children."""
    from tests import methods
    from tests.families import make_adapter, make_speaking_base

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        base, other_base = make_speaking_base(root / "base"), make_speaking_base(root / "other-base", seed=1)
        adapters = [make_adapter(base, root / name, seed=seed) for seed, name in enumerate(("one", "two", "three"), 1)]
        pickle = root / "pickle"
        pickle.mkdir()
        tensors = {key.removeprefix(methods.PREFIX): tensor for key, tensor in methods.reslora_tensors(base).items()}
    torch.save(tensors, pickle / "pytorch_model_lora.bin")
    (pickle / "reslora_config.json").write_text(
        '{"rank": 4, "lora_alpha": 8, "lora_num": 3, "res_flag": 2, "merge_flag": 0, "pre_num": 999}'
    )
    return Sources(base, other_base, *adapters, pickle)


@dataclass(frozen=True)
class Scene:
    """What is built of the sources, by commands. Nothing changes it: each trial has copies."""

    sources: Sources
    one: Path  # artifacts of an adapter each, verified
    two: Path
    bank: Path  # of adapters one and two, with an empty slot
    repo: Path  # one is live
    repo2: Path  # two is live, after one
    bank_repo: Path


def make_scene(forks: Forks, root: Path) -> Scene:
    """Build it."""
    s = make_sources(root)
    scene = Scene(s, *(root / name for name in ("out1", "out2", "bank", "repo1", "repo2", "bank-repo")))
    do(forks, *s.build([s.one], scene.one))
    do(forks, *s.build([s.two], scene.two))
    do(forks, *s.build([s.one, s.two], scene.bank, "--name", "first", "--name", "second", "--bank", "stack", "--slots", 3))
    do(forks, "triton", scene.one, scene.repo)
    shutil.copytree(scene.repo, scene.repo2)
    do(forks, "triton", scene.two, scene.repo2)
    do(forks, "triton", scene.bank, scene.bank_repo)
    return scene


def do(forks: Forks, *args: object, timeout: float = 300.0) -> None:
    """Run a command that must succeed: what a scene is made of."""
    ended = forks.one(args, timeout=timeout)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(map(str, args[:3]))} ... failed: {ended.told()}")
