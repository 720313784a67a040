"""Plain Hugging Face: an adapter of neurons alone makes a standard checkpoint with a larger `intermediate_size`.

What is written holds no code of ours and needs none: config.json, safetensors shards with their index, the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM

from flora_export.artifact import Artifact
from flora_export.backends import Backend, Limits, Plan, Progress, check_can_be_silenced
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.hf_layout import branches_in_file, changed, check_neurons, plan, widened
from flora_export.backends.manifest import describe
from flora_export.backends.padding import pad_prompts, positions_of
from flora_export.base_model import GENERATION, BaseModel, read_json
from flora_export.branch import Branch
from flora_export.errors import BackendError, FusionError
from flora_export.ledger import block_records, sha256_of
from flora_export.manifest import LedgerEntry, Manifest, Tensor
from flora_export.passes import Fused
from flora_export.quiet import quiet
from flora_export.reference import kept_outputs
from flora_export.shards import write_shards
from flora_export.weights import Array, Part

if TYPE_CHECKING:
    from flora_export.backends import Cache

COPIED = (
    GENERATION, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of config.json
ELEMENTS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}  # of the manifest

Logits = npt.NDArray[np.float32]


class HuggingFace(Backend):
    name = "hf"
    targets = {"any": "weights"}  # noqa: RUF012  # never written to
    unquantized = "write fp32 or fp16, and quantize that checkpoint: it is a plain one, and any quantizer takes it"
    runs_graph = False  # the graph only tells how weights hang together

    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        return write(fused, directory, plan.target, progress)

    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Decoder:
        return Decoder(artifact, adapter=adapter, threads=threads)

    def decode_base(self, artifact: Artifact, base: BaseModel, directory: Path, *, exact: bool = False) -> Decoder:
        precision = artifact.manifest.precision
        write_shards(directory, plan(base, precision, {}, lambda *_: None))
        _write_config(base, directory, None, DTYPES[precision])
        return Decoder(Artifact(directory, artifact.manifest))

    def block_outputs(self, artifact: Artifact, branches: Sequence[Branch], tokens: list[int]) -> dict[str, tuple[str, Logits]]:
        values = Decoder(artifact).block_outputs(tokens, [branch.block for branch in branches])
        return {block: (block, value) for block, value in values.items()}


def write(fused: Fused, directory: Path, target: str, progress: Progress) -> Manifest:
    """Write the checkpoint into a directory. Returns the manifest, still without the files' hashes.

    Raises:
        FusionError: the adapter, or the base model, cannot be written as a plain checkpoint; the message says why and what to do.
    """
    if fused.detours:
        raise FusionError(
            f"{fused.detours[0].tensor}: a plain Hugging Face checkpoint has no place for an A and a B beside a weight. "
            "Build with --merge, or serve the adapter itself with PEFT."
        )
    neurons, recipes = None, changed(fused)
    if fused.branches:
        neurons = check_neurons(fused)
        more, wide = widened(fused, neurons)
        neurons, recipes = neurons + more, recipes | wide
    ledger: list[LedgerEntry] = []
    stops: dict[str, int] = defaultdict(int)
    done = 0

    def note(name: str, axis: int, part: Part, values: Array) -> None:
        nonlocal done
        start = stops[name]
        stops[name] = start + part.size
        ledger.append(LedgerEntry(part.tensor, part.origin, name, axis, start, stops[name], part.scale, sha256_of(values)))
        if start == 0:
            done += 1
            progress("writing", done, len(tensors))

    precision = fused.capture.precision
    tensors = plan(fused.base, precision, recipes, note)
    write_shards(directory, tensors)
    _write_config(fused.base, directory, neurons, DTYPES[precision])
    for name in COPIED:
        if (fused.base.path / name).is_file():
            shutil.copyfile(fused.base.path / name, directory / name)
    hosts = branches_in_file(fused.branches)
    rows: list[int | str] = ["batch", "sequence_len"]
    return describe(
        fused,
        backend="hf",
        target=target,
        padding="left",
        versions={},
        inputs=[Tensor(name, "INT64", rows) for name in ("input_ids", "attention_mask", "position_ids")],
        outputs=[Tensor("logits", ELEMENTS[precision], [*rows, fused.base.vocabulary])],
        blocks=[dataclasses.replace(r, reads=hosts[r.block][0], writes=hosts[r.block][1]) for r in block_records(fused)],
        ledger=ledger,
    )


def _write_config(base: BaseModel, directory: Path, neurons: int | None, dtype: str) -> None:
    """The base model's config.json, but for its dtype, and its neurons where these are given. Code (`auto_map`) does not come along."""
    config = read_json(base.path / "config.json", "base model configuration")
    config.pop("auto_map", None)
    if neurons is not None:
        config["intermediate_size"] = neurons
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:  # older versions of transformers say torch_dtype
        config[key] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Decoder:
    """A written checkpoint in transformers, loaded as anyone would, decoding a batch of prompts with a KV cache, padded on the left."""

    def __init__(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0) -> None:
        """Load the artifact; without its adapter, B's columns of each down projection are zeroed in memory.

        Args:
            threads: of PyTorch, in the whole process; 0 leaves them as they are.

        Raises:
            BackendError: transformers refuses the checkpoint, or does not find in it exactly the tensors that its model has.
        """
        self.artifact, self.limits = artifact, Limits()
        self.runtime = f"transformers {transformers.__version__}, PyTorch {torch.__version__} on the CPU"
        if threads:
            torch.set_num_threads(threads)
        try:
            with quiet():
                self.model, found = AutoModelForCausalLM.from_pretrained(
                    artifact.path,
                    dtype="auto",
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers documents no error types
            raise BackendError(f"transformers refuses {artifact.path} ({type(error).__name__}: {error})") from error
        wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
        if wrong:
            raise BackendError(f"transformers does not find its model's tensors in {artifact.path}: {wrong}")
        self.model.eval()
        self.choice = AdapterChoice(artifact)
        if not adapter:
            self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        check_can_be_silenced(self.artifact)
        parameters = dict(self.model.named_parameters())
        for entry in self.artifact.manifest.ledger:
            if entry.origin == "adapter" and entry.axis == 1:  # what fills columns of a weight [out, in] is a B
                if entry.initializer not in parameters:
                    raise BackendError(f"{self.artifact.path}: transformers' model has no parameter {entry.initializer}")
                parameters[entry.initializer].narrow(entry.axis, entry.start, entry.stop - entry.start).zero_()

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""
        ids, mask = pad_prompts(prompts, right=False)
        self.mask = torch.from_numpy(mask)
        self.cache: Any = None
        logits = self._run(torch.from_numpy(ids), torch.from_numpy(positions_of(mask)))
        return [logits[row][mask[row] == 1] for row in range(len(prompts))]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._run(torch.tensor(list(tokens))[:, None], positions)[:, -1]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer, as the model fills its cache."""
        self.start([[0]])
        return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in self.cache.layers]

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self.mask = torch.ones((batch, past), dtype=torch.long)
        self.cache = transformers.DynamicCache()
        for layer, pair in enumerate(cache):
            self.cache.update(*(torch.from_numpy(array).to(self.model.dtype) for array in pair), layer)

    @torch.no_grad()
    def _run(self, ids: torch.Tensor, positions: torch.Tensor) -> Logits:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens]."""
        try:
            output = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True)
        except Exception as error:  # of a damaged configuration, nearly anything
            raise BackendError(f"transformers failed on input_ids {tuple(ids.shape)} ({type(error).__name__}: {error})") from error
        self.cache = output.past_key_values
        logits: Logits = output.logits.float().numpy()
        return logits

    def block_outputs(self, tokens: Sequence[int], blocks: Sequence[str]) -> dict[str, Logits]:
        """What each block returns for one prompt, [tokens, d], by the name of its module."""
        modules = dict(self.model.named_modules())
        with kept_outputs({block: modules[block] for block in blocks if block in modules}) as outputs:
            self.start([tokens])
        return outputs


BACKEND = HuggingFace()
