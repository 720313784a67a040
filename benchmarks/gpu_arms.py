"""What `gpu.py` times: random models of real shapes, and one Step per arm of a cell, in PyTorch and in ONNX Runtime.

A cell is one metric, number of tokens and batch size. All its PyTorch arms share inputs and one StaticCache, of past + 1 places for
decode and of the prompt's length for prefill: nothing is masked or padded, and attention is as cheap as SDPA makes it, so that what an
adapter costs is not hidden behind it.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from fused_torch import fuse, make_arm, share_copy
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, StaticCache

from flora_export.ffba import FFBAConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama-3.2-3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 64,
    },
}
LLAMA = {
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_STARTS = (10_000_000, 40_000_000, 160_000_000)  # GPU cycles to try: about 5, 20 and 80 ms
ORT_LEVELS = {"base": None, "unfused": "none", "fused": "both"}


@dataclass(frozen=True)
class Cell:
    """`tokens` are the prompt of a prefill, or the past of a decode step."""

    shape: str
    dtype: str
    metric: str
    tokens: int
    batch: int


@dataclass(frozen=True)
class Step:
    """One arm's timed call, and what goes before each call, untimed. `clock` is "cuda" (events) or "cpu" (the host's)."""

    call: Callable[[], Tensor | None]
    prepare: Callable[[], object]
    clock: str

    def milliseconds(self, head_start: bool) -> float:
        """Time one call. It begins on an idle device; with `head_start`, on one that is kept busy until the host has launched all of it."""
        if self.clock != "cuda":
            self.prepare()
            began = time.perf_counter()
            self.call()
            return (time.perf_counter() - began) * 1000
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for cycles in HEAD_STARTS if head_start else (0,):
            self.prepare()
            torch.cuda.synchronize()
            if cycles:
                torch.cuda._sleep(cycles)
            start.record()
            self.call()
            stop.record()
            late = start.query()  # the device came to the call before the host was through with it
            stop.synchronize()
            if not (cycles and late):
                return float(start.elapsed_time(stop))
        raise RuntimeError(f"the host needs longer than {HEAD_STARTS[-1]:.0e} GPU cycles to launch this call")


@dataclass(frozen=True)
class Parity:
    """An error over the adapter's own effect: a missing adapter makes it 1. NaN does not pass."""

    check: str
    error_over_effect: float
    allowed: float
    noise_floor: float | None = None  # unfused's own error in this dtype

    @property
    def passed(self) -> bool:
        return self.error_over_effect <= self.allowed


def attend_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """SDPA without a mask, over a cache that is exactly full. query: [batch, heads, tokens, head size]."""
    grouped = query.shape[1] != key.shape[1]
    h = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=grouped)
    return h.transpose(1, 2).contiguous(), None


AttentionInterface.register("attend_all", attend_all)  # transformers makes no mask for an attention that it has no mask maker for


def make_base(shape: str, dtype: torch.dtype, device: str, **changes: Any) -> nn.Module:
    """A random Llama of a shape, made on the device."""
    config = LlamaConfig(**(LLAMA | SHAPES[shape] | changes))
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="attend_all")
    return model.eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of its parameters, tied ones once: what a decode step reads at least."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_two_layers(shape: str, dtype: str, rank: int, device: str) -> Iterator[Parity]:
    """Fused against unfused on two layers of a shape: exact in fp32, and in the dtype within twice the noise of unfused."""
    base = make_base(shape, torch.float32, device, num_hidden_layers=2, vocab_size=64)
    ids = torch.randint(0, 64, (2, 25), device=device)

    def logits(model: nn.Module) -> Tensor:
        """Of a prefill and a cached step: [2, 25, 64]."""
        prefill = model(input_ids=ids[:, :-1], use_cache=True)
        step = model(input_ids=ids[:, -1:], past_key_values=prefill.past_key_values)
        return torch.cat([prefill.logits, step.logits], dim=1).float()

    unfused = make_arm("unfused", base, rank)
    truth = logits(unfused)
    effect = (truth - logits(base)).norm()

    def error(model: nn.Module) -> float:
        return ((logits(model) - truth).norm() / effect).item()

    yield Parity("two layers in fp32, prefill and cached step: fused against unfused", error(fuse(unfused)), 1e-4)
    if dtype != "fp32":
        rounded = copy.deepcopy(unfused)
        for parameter in rounded.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
        floor = error(rounded)
        check = "two layers in this dtype against fp32 unfused; allowed is twice the noise floor"
        yield Parity(check, error(fuse(rounded)), 2 * floor, noise_floor=floor)


def compare_outputs(outputs: dict[str, Tensor], dtype: str) -> Parity | None:
    """Fused against unfused as timed, at full depth. In 16 bits it tells a wrong adapter from noise, no more."""
    if not {"base", "unfused", "fused"} <= outputs.keys():
        return None
    effect = (outputs["unfused"] - outputs["base"]).norm()
    error = ((outputs["fused"] - outputs["unfused"]).norm() / effect).item()
    return Parity("fused against unfused, as timed", error, 1e-3 if dtype == "fp32" else 0.5)


def torch_steps(arms: dict[str, nn.Module], cell: Cell, config: LlamaConfig, device: str) -> dict[str, Step]:
    """A step per arm. Decode starts from random keys and values."""
    past, new = (cell.tokens, 1) if cell.metric == "decode" else (0, cell.tokens)
    torch.manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (cell.batch, new), device=device)
    positions = torch.arange(past, past + new, device=device)[None]
    cache = StaticCache(config=config, max_cache_len=past + new)
    head = config.hidden_size // config.num_attention_heads
    cache.early_initialization(cell.batch, config.num_key_value_heads, head, DTYPES[cell.dtype], torch.device(device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(past)
        torch.compiler.cudagraph_mark_step_begin()

    def call(model: nn.Module) -> Tensor:
        """Logits of the last token: [batch, 1, vocabulary]."""
        logits: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    return {arm: Step(functools.partial(call, model), rewind, torch.device(device).type) for arm, model in arms.items()}


def graph_skips() -> int:
    """How often Inductor has gone without CUDA graphs."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def why_no_onnxruntime(device: str) -> str | None:
    """Why ONNX Runtime's arms cannot run here; None where they can."""
    for package in ("onnxruntime", "onnx_ir", "mobius"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import onnxruntime

    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    available = onnxruntime.get_available_providers()
    return None if provider in available else f"this onnxruntime has no {provider}, but {', '.join(available)}"


def save_sources(base: nn.Module, rank: int, work: Path) -> None:
    """The base model and a random adapter for it, as directories that flora_export reads."""
    base.save_pretrained(work / "model")
    config = FFBAConfig(r=rank, alpha=float(rank), gated_gain=1.0, init_ffba_weights=False)
    adapted = peft.get_peft_model(share_copy(base), config, autocast_adapter_dtype=False)
    adapted.save_pretrained(work / "adapter", save_embedding_layers=False)


def make_decoder(arm: str, work: Path, target: str, precision: str) -> Any:
    """An arm as flora_export builds it, loaded into ONNX Runtime: a `flora_export.backends.onnxruntime.Decoder`."""
    from flora_export.artifact import Artifact
    from flora_export.backends.graph_files import write_graph
    from flora_export.backends.onnxruntime import Decoder
    from flora_export.base_model import load_base
    from flora_export.capture import capture
    from flora_export.ledger import write_model
    from flora_export.methods import load_checkpoint
    from flora_export.passes import fuse_adapter

    out = work / arm
    out.mkdir()
    base = load_base(str(work / "model"))
    checkpoint = load_checkpoint(work / "adapter", base)
    level = ORT_LEVELS[arm]
    fused = fuse_adapter(capture(base, target, precision), base, checkpoint, level or "none")
    manifest = write_graph(fused, out, "onnxruntime", target, lambda *_: None)
    if level is None:  # the base model alone, under a manifest like theirs
        write_model(capture(base, target, precision).model, out)
        manifest = replace(manifest, blocks=[], ledger=[])
    return Decoder(Artifact(out, manifest))


def ort_step(decoder: Any, cell: Cell, device: str) -> Step:
    """A step whose inputs, KV cache and outputs stay on the device. Prefill computes the logits of all tokens, as the graph does."""
    import onnxruntime

    def put(values: np.ndarray[Any, Any]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0)

    def bind(ids: np.ndarray[Any, Any], past: int, cache: dict[str, Any]) -> Any:
        batch, new = ids.shape
        feeds = {"input_ids": put(ids), "attention_mask": put(np.ones((batch, past + new), np.int64)), **cache}
        if "position_ids" in decoder.inputs:
            feeds["position_ids"] = put(np.tile(np.arange(past, past + new), (batch, 1)))
        binding = decoder.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in decoder.outputs:
            binding.bind_output(name, device)
        return binding

    ids = np.random.default_rng(0).integers(0, 64, (cell.batch, cell.tokens))
    empty = {name: decoder._empty(value, cell.batch) for name, value in decoder.cache_inputs.items()}
    binding = bind(ids, 0, empty)
    if cell.metric == "decode":
        decoder.session.run_with_iobinding(binding)
        present = dict(zip(decoder.outputs, binding.get_outputs(), strict=True))
        cache = {name: present[name.replace("past_key_values.", "present.")] for name in empty}
        binding = bind(ids[:, :1], cell.tokens, cache)
    run = functools.partial(decoder.session.run_with_iobinding, binding)
    return Step(run, lambda: None, "cpu")  # run_with_iobinding returns when the device is done
