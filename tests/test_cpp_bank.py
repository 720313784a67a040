"""The C++ example on a bank: each row's own adapter, and an adapter swapped in the memory that ONNX Runtime reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_export.artifact import GOLDEN, MODEL, Artifact, open_artifact, seal
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.quantizing import QuantizationOptions
from flora_export.bank import COLUMNS, STACK
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.cpp import decode, greedy
from tests.families import LAYERS, make_adapter

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [14, 15, 16, 17] * 8]
STEPS = 20
NAMES = ("first", "second", "base")
KEY = "base_model.model.model.layers.1.mlp.ffba_{}.weight"
Banks = Callable[..., Artifact]


@pytest.fixture(scope="module")
def banks(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Banks:
    """Banks of two adapters, of ranks 4 and 6; a stack has one slot more, which is empty."""
    root = tmp_path_factory.mktemp("banks")
    members = (("first", adapter), ("second", make_adapter(base, root / "adapter", seed=2, r=6)))
    made: dict[tuple[str, str], Artifact] = {}

    def get(layout: str, precision: str = "fp32") -> Artifact:
        if (layout, precision) not in made:
            options = BuildOptions(
                precision=precision,
                bank=BankOptions(members, layout, 3 if layout == STACK else None),
                settings=QuantizationOptions(adapter_precision="keep") if precision == "int4" else None,
            )
            made[layout, precision] = build(adapter, str(base), root / f"{layout}-{precision}", options, silent)[0]
        return made[layout, precision]

    return get


@pytest.fixture
def stack(banks: Banks, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(banks(STACK).path, tmp_path / "stack"))


@pytest.fixture
def incoming(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "incoming", seed=3)


def change(checkpoint: Path, **config: Any) -> None:
    """Change its configuration; None takes a key away."""
    content = json.loads((checkpoint / CONFIG).read_text()) | config
    (checkpoint / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def python_tokens(artifact: Artifact, slot: int | None = None) -> list[list[int]]:
    """Of each prompt, alone."""
    decoder = Decoder(artifact, threads=1)
    if slot is not None:
        decoder.choice.choose(slot)
    return [greedy(decoder, prompt, STEPS) for prompt in PROMPTS]


def adapters(*names: object) -> list[object]:
    return [word for name in names for word in ("--adapter", name)]


@pytest.mark.parametrize(("layout", "precision"), [(COLUMNS, "fp32"), (COLUMNS, "fp16"), (STACK, "fp32"), (STACK, "fp16"), (STACK, "int4")])
def test_each_row_has_its_own_adapter(flora_decode: Path, banks: Banks, layout: str, precision: str) -> None:
    """Nine rows in one batch: each prompt with each adapter, and with none."""
    bank = banks(layout, precision)
    assert bank.manifest.bank is not None and bank.manifest.bank.layout == layout
    names = [name for name in NAMES for _ in PROMPTS]
    ran = decode(flora_decode, bank.path, "--tokens", STEPS, *adapters(*names), prompts=PROMPTS * len(NAMES))
    assert ran.code == 0, ran.messages
    expected = [python_tokens(bank, slot) for slot in (0, 1, -1)]
    assert ran.tokens == [tokens for of_one in expected for tokens in of_one]
    for row in range(len(PROMPTS)):
        assert len({tuple(of_one[row]) for of_one in expected}) == len(NAMES)
    assert decode(flora_decode, bank.path, "--tokens", STEPS, *adapters("second"), prompts=PROMPTS).tokens == expected[1]


@pytest.mark.parametrize("layout", [COLUMNS, STACK])
def test_recorded_prompts_have_their_own_adapters(flora_decode: Path, banks: Banks, layout: str) -> None:
    bank = banks(layout)
    recorded = load_file(bank.path / GOLDEN)
    ran = decode(flora_decode, bank.path)
    count = ran.messages.count("golden prompt of")
    assert (ran.code, count) == (0, len(ran.tokens)), ran.messages
    expected = [[*recorded[f"prompt.{i}.tokens"].tolist(), 2] for i in range(count)]
    assert ran.tokens == [tokens[: tokens.index(2)] for tokens in expected]
    assert {int(recorded[f"prompt.{i}.adapter"][0]) for i in range(count)} == {0, 1}


@pytest.mark.parametrize(
    ("slot", "code", "message"),
    [([1], 1, "golden vectors do not replay"), ([2], 2, "no slot that is taken"), ([-1], 2, "no slot that is taken"),
     ([2**40], 2, "no slot that is taken"), ([0, 0], 2, "no slot that is taken"), (None, 2, "has no tensor prompt.0.adapter")],
)  # fmt: skip
def test_another_recorded_adapter(flora_decode: Path, stack: Path, slot: list[int] | None, code: int, message: str) -> None:
    tensors = {name: np.array(tensor) for name, tensor in load_file(stack / GOLDEN).items() if name != "prompt.0.adapter"}
    if slot is not None:
        tensors["prompt.0.adapter"] = np.array(slot, np.int64)
    save_file(tensors, stack / GOLDEN)
    seal(stack, open_artifact(stack).manifest)
    ran = decode(flora_decode, stack)
    assert (ran.code, ran.tokens) == (code, []), ran.messages
    assert message in ran.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "is a bank: say with --adapter which one answers: first, second, base; and the slots 0 to 2"),
        (adapters("third"), "there is no adapter 'third'; there are first, second, base"),
        (adapters(""), "there is no adapter ''"),
        (adapters("3"), "there is no adapter '3'"),
        (adapters("-1"), "there is no adapter '-1'"),
        (adapters("2"), "slot 2 is empty; there are first, second, base"),
        (adapters("first", "second"), "--adapter is there 2 times: give it once, or for each of the 3 prompts"),
        ([*adapters("first"), "--swap", "third=x"], "there is no adapter 'third'"),
        ([*adapters("first"), "--swap", "base=x"], "the base model is in no slot"),
        ([*adapters("first"), "--swap", "second"], "--swap is not understood"),
    ],
)
def test_wrong_choice(flora_decode: Path, banks: Banks, options: list[object], message: str) -> None:
    ran = decode(flora_decode, banks(STACK).path, *options, prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (2, []), ran.messages
    assert message in ran.messages


def test_one_adapter_leaves_none_to_choose(flora_decode: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)[0].path
    ran = decode(flora_decode, out, *adapters("first"), prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (2, []) and "--adapter: the artifact holds one adapter" in ran.messages
    ran = decode(flora_decode, out, "--swap", f"0={adapter / WEIGHTS}", prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (2, []) and 'in a bank of layout "stack" alone' in ran.messages


NEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # how the adapter is made, and what its configuration then says
    "the room's whole rank": ({"r": 6}, {}),
    "a smaller rank, rsLoRA": ({"r": 3, "alpha": 6.0, "use_rslora": True}, {}),
    "one block of one layer": ({"alpha": 32.0, "target_modules": ["mlp"], "layers_to_transform": [1]}, {}),
    "no MLPs": ({"exclude_modules": ["mlp"]}, {}),
    "silence: gated_gain is 16": ({}, {"gated_gain": None}),
    "silence without a version: gated_gain is 1": ({"alpha": 24.0}, {"gated_gain": None, "ffba_version": None}),
}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("new", NEW)
def test_swap(flora_decode: Path, banks: Banks, base: Path, tmp_path: Path, new: str, precision: str) -> None:
    """What is written into the program's memory is what the next run computes with, in the row of that slot alone."""
    made, says = NEW[new]
    checkpoint = make_adapter(base, tmp_path / "incoming", seed=3, **made)
    change(checkpoint, **says)
    quantized = precision == "int4"
    options = BuildOptions(precision=precision, verify=False, settings=QuantizationOptions(adapter_precision="keep") if quantized else None)
    expected = python_tokens(build(checkpoint, str(base), tmp_path / "out", options, silent)[0])
    bank = banks(STACK, precision)
    before, others = python_tokens(bank, 0), python_tokens(bank, 1)
    assert all(a not in (b, c) for a, b, c in zip(expected, before, others, strict=True))

    names = adapters(*["first"] * len(PROMPTS), *["second"] * len(PROMPTS))
    swap = ("--swap", f"first={checkpoint / WEIGHTS}")
    ran = decode(flora_decode, bank.path, "--tokens", STEPS, *swap, *names, prompts=PROMPTS * 2)
    assert ran.code == 0, ran.messages
    assert ran.tokens == [*before, *others, *expected, *others, *before, *others]


def test_swap_into_an_empty_slot(flora_decode: Path, banks: Banks, incoming: Path, base: Path, tmp_path: Path) -> None:
    expected = python_tokens(build(incoming, str(base), tmp_path / "out", BuildOptions(verify=False), silent)[0])
    bare = python_tokens(banks(STACK), -1)
    options = ("--tokens", STEPS, "--swap", f"2={incoming / WEIGHTS}", *adapters("2"))
    ran = decode(flora_decode, banks(STACK).path, *options, prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (0, bare + expected + bare), ran.messages


def write(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage to the tensors."""

    def damage(checkpoint: Path) -> None:
        tensors = {name: np.array(tensor) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
        edit(tensors)
        save_file(tensors, checkpoint / WEIGHTS)

    return damage


def says(**config: Any) -> Callable[[Path], None]:
    return lambda checkpoint: change(checkpoint, **config)


def poke(matrix: str, value: float) -> Callable[[Path], None]:
    return write(lambda tensors: tensors[KEY.format(matrix)].__setitem__((1, 2), value))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "half precision": (write(lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()})), "is F16, but must be F32"),
    "a missing tensor": (write(lambda t: t.pop(KEY.format("G"))), f"has no tensor {KEY.format('G')}"),
    "one tensor more": (write(lambda t: t.update(more=np.zeros(1, np.float32))), f"{5 * LAYERS + 1} tensors, but"),
    "another model": (write(lambda t: t.update({k: v[..., :32].copy() for k, v in t.items() if "_A" in k})), "another shape than width 64"),
    "another rank": (says(r=3), "another shape than width 64 and rank 3"),
    "no room": (says(r=7), "its rank is 7, but model.layers.0.self_attn.ffba_A.weight_t has room for 6"),
    "NaN": (poke("A", float("nan")), f"{KEY.format('A')} holds numbers that are not finite"),
    "infinity, in the last tensor": (poke("B", float("inf")), f"{KEY.format('B')} holds numbers that are not finite"),
    "overflow": (says(alpha=1e29, gated_gain=1e29), "or are not when they are scaled"),
    "half a file": (lambda c: (c / WEIGHTS).write_bytes((c / WEIGHTS).read_bytes()[:5000]), "lies outside the file"),
    "no file": (lambda c: (c / WEIGHTS).unlink(), "cannot be read"),
    "no configuration": (lambda c: (c / CONFIG).unlink(), "must lie beside the adapter's weights"),
    "no JSON": (lambda c: (c / CONFIG).write_text("{"), "is not JSON"),
    "no object": (lambda c: (c / CONFIG).write_text("[]"), "is no JSON object"),
    "no rank": (says(r=None), "r is null, but a rank is"),
    "rank 0": (says(r=0), "r is 0, but a rank is"),
    "no scale": (says(alpha="8"), 'alpha is "8", but must be a finite number'),
    "a gain": (says(gated_gain=1e30), "gated_gain is 1e+30, but"),
    "rsLoRA or not": (says(use_rslora=1), "use_rslora is 1, but"),
    "another method": (says(peft_type="LORA"), 'peft_type is "LORA", but'),
    "a newer version": (says(ffba_version=2), "ffba_version is 2, but"),
    "ranks": (says(rank_pattern={"mlp": 4}), 'rank_pattern is {"mlp":4}, but'),
    "modules": (says(modules_to_save=["lm_head"]), "modules_to_save is"),
    "a regular expression": (says(target_modules=".*mlp"), "target_modules is"),
    "no targets": (says(target_modules=[]), "target_modules is []"),
    "an exclusion": (says(exclude_modules=".*mlp"), "exclude_modules is"),
    "a layer": (says(layers_to_transform=["1"]), "layers_to_transform is"),
    "no block": (says(target_modules=["lp"]), "selects no block"),
    "fewer blocks": (says(target_modules=["mlp"]), f"but the bank and the configuration have a place for {3 * LAYERS}"),
    "another activation": (says(attn_activation="relu"), 'attn_activation is "relu", but the bank has identity'),
    "another activation, of MLPs": (says(mlp_activation="silu"), 'mlp_activation is "silu", but the bank has gated'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_change_nothing(flora_decode: Path, banks: Banks, incoming: Path, name: str) -> None:
    damage, message = BAD[name]
    damage(incoming)
    options = ("--tokens", 5, *adapters("first"), "--swap", f"first={incoming / WEIGHTS}")
    ran = decode(flora_decode, banks(STACK).path, *options, prompts=PROMPTS)
    expected = [tokens[:5] for tokens in python_tokens(banks(STACK), 0)]
    assert (ran.code, ran.tokens) == (2, expected * 2), ran.messages
    assert "error: " in ran.messages and message in ran.messages


@pytest.mark.parametrize(
    ("layout", "precision", "message"),
    [(COLUMNS, "fp32", 'in a bank of layout "stack" alone'), (STACK, "fp16", "is not fp32, and this program replaces fp32 adapters alone")],
)
def test_banks_that_take_no_swap(flora_decode: Path, banks: Banks, incoming: Path, layout: str, precision: str, message: str) -> None:
    options = (*adapters("first"), "--swap", f"first={incoming / WEIGHTS}")
    ran = decode(flora_decode, banks(layout, precision).path, *options, prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (2, []) and message in ran.messages


def test_a_graph_cut_off(flora_decode: Path, stack: Path, incoming: Path) -> None:
    """The program finds the stacks' numbers by model.onnx, before ONNX Runtime sees it."""
    (stack / MODEL).write_bytes((stack / MODEL).read_bytes()[:-100])
    seal(stack, open_artifact(stack).manifest)
    ran = decode(flora_decode, stack, *adapters("first"), "--swap", f"first={incoming / WEIGHTS}", prompts=PROMPTS)
    assert (ran.code, ran.tokens) == (2, []) and "model.onnx is damaged: it ends too soon" in ran.messages
