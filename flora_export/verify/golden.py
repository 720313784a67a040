"""Golden vectors: recorded inputs and PyTorch's answers in fp64, so that a C++ or Triton host replays them without torch.

`golden.safetensors` holds, for prompts i = 0, 1, ...:
    prompt.{i}.input_ids   int64 [tokens]
    prompt.{i}.tokens      int64 [steps]              the greedy continuation
    prompt.{i}.logits      float32 [steps, vocabulary]  after the prompt, and after each token but the last
    prompt.{i}.adapter     int64 [1]                  of a bank: the slot of the adapter that answers

Logits are rounded to 18 bits after the largest's leading one, well below what a replay allows, so that the file's bytes are the same
whatever processor computed them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flora_export.artifact import GOLDEN, Artifact
from flora_export.backends import Runner
from flora_export.errors import ArtifactError
from flora_export.verify.coverage import run_forced
from flora_export.verify.numerics import TOLERANCES, Expected, Logits

PROMPT_COUNT = 2
BITS = 18
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recorded:
    """A recorded prompt; `slot` says which adapter of a bank has answered."""

    ids: Ids
    tokens: Ids
    logits: Logits
    slot: int | None = None


def record(item: Expected, slot: int | None = None) -> Recorded:
    """What is recorded of the truth for a prompt."""
    logits = _rounded(item.adapted[len(item.prompt) - 1 : -1])
    return Recorded(np.array(item.prompt, np.int64), np.array(item.tokens, np.int64), logits, slot)


def write_golden(prompts: Sequence[Recorded], directory: Path) -> None:
    """Write recorded prompts."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for index, each in enumerate(prompts):
        if each.slot is not None:
            tensors[f"prompt.{index}.adapter"] = np.array([each.slot], np.int64)
        tensors[f"prompt.{index}.input_ids"] = each.ids
        tensors[f"prompt.{index}.tokens"] = each.tokens
        tensors[f"prompt.{index}.logits"] = each.logits
    save_file(tensors, directory / GOLDEN)


def _rounded(logits: Logits) -> Logits:
    """To multiples of a power of two that is 2^-18 of the largest, or a little more."""
    grid = np.float32(2.0 ** (math.ceil(math.log2(max(1e-30, float(np.abs(logits).max())))) - BITS))
    rounded: Logits = np.round(logits / grid) * grid
    return rounded


def recorded_prompts(artifact: Artifact) -> list[Recorded]:
    """The recorded prompts, checked for shape; of a bank, for slots that there are.

    Raises:
        ArtifactError: there are no golden vectors, or they are damaged.
    """
    file = artifact.path / GOLDEN
    if not file.is_file():
        raise ArtifactError(f"{artifact.path} has no {GOLDEN}: it was built with --no-verify. Verify it with --ckpt and --base.")
    try:
        tensors = load_file(file)
        count = sum(name.endswith(".input_ids") for name in tensors)
        recorded = [
            Recorded(
                tensors[f"prompt.{i}.input_ids"], tensors[f"prompt.{i}.tokens"], tensors[f"prompt.{i}.logits"], _slot(artifact, tensors, i)
            )
            for i in range(count)
        ]
    except (SafetensorError, KeyError, OSError) as error:
        raise ArtifactError(f"{file} is damaged ({error}). Build the artifact again.") from error
    vocabulary = (artifact.manifest.outputs[0].shape or [""])[-1]
    if not isinstance(vocabulary, int):
        raise ArtifactError(f"{artifact.path}: its manifest does not say how many logits the graph gives. Build the artifact again.")
    sound = [
        each.ids.ndim == each.tokens.ndim == 1 and len(each.ids) and len(each.tokens)
        and each.logits.shape == (len(each.tokens), vocabulary)
        and all(a.dtype == np.int64 and a.min() >= 0 and a.max() < vocabulary for a in (each.ids, each.tokens))
        for each in recorded
    ]  # fmt: skip
    if not count or not all(sound):
        raise ArtifactError(
            f"{file} is damaged: it must hold prompts of int64 tokens below {vocabulary}, and their logits. Build it again."
        )
    return recorded


def _slot(artifact: Artifact, tensors: Mapping[str, npt.NDArray[Any]], index: int) -> int | None:
    """The adapter of a recorded prompt; None where the artifact is no bank. Raises KeyError: there is none of it, or no such slot."""
    bank = artifact.manifest.bank
    if bank is None:
        return None
    slot = int(tensors[f"prompt.{index}.adapter"].reshape(-1)[0])
    if slot not in bank.taken.values():
        raise KeyError(f"prompt.{index}.adapter is {slot}, which is no slot that is taken")
    return slot


def replay(artifact: Artifact, runner: Runner, prompts: Sequence[Recorded] | None = None) -> list[str]:
    """Run recorded prompts, without others those of the artifact, and compare. Returns faults, a line each.

    Raises:
        ArtifactError: as `recorded_prompts` does.
    """
    faults = []
    for index, recorded in enumerate(recorded_prompts(artifact) if prompts is None else prompts):
        if recorded.slot is not None:
            runner.choice.choose(recorded.slot)
        got = run_forced(runner, [recorded.ids.tolist()], [recorded.tokens.tolist()[:-1]])[0][len(recorded.ids) - 1 :]
        off = float(np.abs(got - recorded.logits).max())
        allowed = allowed_error(artifact, recorded.logits)
        if not off <= allowed:
            faults.append(f"golden prompt {index}: logits are off by {off:.3g} (allowed {allowed:.3g})")
    return faults


def allowed_error(artifact: Artifact, logits: Logits) -> float:
    """The largest error of logits in the artifact's precision."""
    return TOLERANCES[artifact.manifest.precision].logits * max(1.0, float(np.abs(logits).max()))
