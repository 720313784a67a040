"""The PEFT method: the formula, and everything that PEFT users do with an adapter."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from flora_export.ffba import FFBAConfig, FFBALayer
from flora_export.ffba.init import start_at_leading_directions
from tests.families import VOCABULARY, WIDTH

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def adapted(model: PreTrainedModel, **config: object) -> peft.PeftModel:
    torch.manual_seed(1)
    defaults = {"r": 4, "alpha": 8.0, "init_ffba_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, FFBAConfig(**(defaults | config))).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu", "gated"])
def test_the_formula(model: PreTrainedModel, activation: str, rslora: bool) -> None:
    """y = block(x) + s · B φ(A x), written out by hand."""
    peft_model = adapted(model, mlp_activation=activation, target_modules=["mlp"], use_rslora=rslora, gated_gain=3.0)
    layer = peft_model.base_model.model.model.layers[0].mlp
    assert isinstance(layer, FFBALayer)
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    a, b = layer.ffba_A["default"].weight, layer.ffba_B["default"].weight
    assert a.shape == (4, WIDTH)
    assert b.shape == (WIDTH, 4)
    z = x @ a.T
    if activation == "gated":
        gate = x @ layer.ffba_G["default"].weight.T
        z = gate * torch.sigmoid(gate) * z  # the host's own activation, SiLU
    elif activation != "identity":
        z = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}[activation](z)
    scale = (8.0 / math.sqrt(4) if rslora else 8.0 / 4) * (3.0 if activation == "gated" else 1.0)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * (z @ b.T), rtol=0, atol=1e-6)


def test_a_new_adapter_is_silent_and_disabling_it_gives_the_base(model: PreTrainedModel) -> None:
    before = model(IDS).logits
    silent = adapted(copy.deepcopy(model), init_ffba_weights=True)
    torch.testing.assert_close(silent(IDS).logits, before, rtol=0, atol=0)
    loud = adapted(model)
    assert (loud(IDS).logits - before).abs().max() > 0.05
    with loud.disable_adapter():
        torch.testing.assert_close(loud(IDS).logits, before, rtol=0, atol=0)


def test_forward_adapters_start_at_the_leading_directions_of_their_hosts(model: PreTrainedModel) -> None:
    peft_model = adapted(model, init_ffba_weights=True)
    layer = peft_model.base_model.model.model.layers[0]
    for block, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
        host = torch.cat([getattr(block, name).weight for name in names])
        leading = torch.linalg.svd(host).Vh[:8]
        a = block.ffba_A["default"].weight
        rows, expected = (a, leading[:4]) if block.kind == "attention" else (torch.cat([a, block.ffba_G["default"].weight]), leading)
        torch.testing.assert_close((rows @ expected.T).abs(), torch.eye(len(rows)), rtol=0, atol=1e-3)  # but for their sign
        torch.testing.assert_close(rows.gather(1, rows.abs().argmax(1, keepdim=True)), rows.abs().max(1, keepdim=True).values)
        assert not block.ffba_B["default"].weight.any()


def test_forward_adapters_wider_than_their_hosts_start_over(model: PreTrainedModel) -> None:
    mlp = adapted(model, init_ffba_weights=True, r=WIDTH).base_model.model.model.layers[0].mlp
    torch.testing.assert_close(mlp.ffba_A["default"].weight, mlp.ffba_G["default"].weight)


def test_forward_adapters_can_start_at_random_and_do_where_no_host_is_known(model: PreTrainedModel) -> None:
    mlp = adapted(model, init_ffba_weights="kaiming").base_model.model.model.layers[0].mlp
    assert 0.9 / math.sqrt(WIDTH) < mlp.ffba_A["default"].weight.abs().max() <= 1 / math.sqrt(WIDTH)  # uniform, as LoRA's A
    assert not mlp.ffba_B["default"].weight.any()
    with pytest.raises(ValueError, match="init_ffba_weights is 'pissa', but must be True, 'kaiming' or False"):
        FFBAConfig(init_ffba_weights="pissa")
    odd = nn.ModuleDict({"w1": nn.Linear(8, 8)})
    linear = nn.Linear(8, 2, bias=False)
    with pytest.warns(UserWarning, match=r"layers.0.mlp \(ModuleDict\): it has none of the projections gate_proj"):
        start_at_leading_directions(odd, "mlp", "layers.0.mlp", [linear])


def test_a_base_whose_numbers_cannot_be_read_can_be_trained_beside(model: PreTrainedModel) -> None:
    """8-bit floats have scales elsewhere, and some quantizers keep buffers alone: a random start, in numbers that can learn."""
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(model.model.layers[0].self_attn, projection).to(torch.float8_e4m3fn)
        bare = nn.Module()
        bare.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
        setattr(model.model.layers[1].self_attn, projection, bare)
    with pytest.warns(UserWarning, match=r"self_attn .*: q_proj \(\w+\) has no weight that could be read as plain numbers") as said:
        layers = adapted(model, init_ffba_weights=True, target_modules=["self_attn"]).base_model.model.model.layers
    assert len([w for w in said if "plain numbers" in str(w.message)]) == 2
    for layer in layers:
        a = layer.self_attn.ffba_A["default"].weight
        assert a.dtype == torch.float32 and a.requires_grad and a.abs().max() <= 1 / math.sqrt(WIDTH)


def test_save_and_load_are_exact(model: PreTrainedModel, base: Path, tmp_path: Path) -> None:
    peft_model = adapted(model, rank_pattern={"layers.1.mlp": 7}, layers_to_transform=[1], attn_activation="silu", use_rslora=True)
    expected = peft_model(IDS).logits
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=0)
    assert loaded.base_model.model.model.layers[1].mlp.ffba_rank == {"default": 7}
    assert not isinstance(loaded.base_model.model.model.layers[0].mlp, FFBALayer)


def test_registration_needs_only_the_import(base: Path, adapter: Path) -> None:
    code = f"import flora_export.ffba, peft; print(peft.PeftConfig.from_pretrained({str(adapter)!r}).peft_type.value)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "FFBA"


def test_several_adapters(model: PreTrainedModel) -> None:
    peft_model = adapted(model)
    one = peft_model(IDS).logits
    peft_model.add_adapter("two", FFBAConfig(r=3, mlp_activation="relu", init_ffba_weights=False))
    torch.testing.assert_close(peft_model(IDS).logits, one, rtol=0, atol=0)
    assert not any(p.requires_grad for n, p in peft_model.named_parameters() if "two" in n)
    peft_model.set_adapter("two")
    two = peft_model(IDS).logits
    assert (two - one).abs().max() > 0.01
    assert all(p.requires_grad == ("two" in n) for n, p in peft_model.named_parameters() if "ffba_" in n)
    peft_model.set_adapter("default")
    torch.testing.assert_close(peft_model(IDS).logits, one, rtol=0, atol=0)
    peft_model.delete_adapter("two")
    torch.testing.assert_close(peft_model(IDS).logits, one, rtol=0, atol=0)


def test_trainable_parameters(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    adapted(model).print_trainable_parameters()
    # 2 layers of attention A, B and MLP A, B, G
    assert f"trainable params: {2 * 5 * 4 * WIDTH:,}" in capsys.readouterr().out


def test_unload_gives_the_base_back_and_merging_is_refused(model: PreTrainedModel) -> None:
    before = model(IDS).logits
    peft_model = adapted(model)
    for merge in (peft_model.merge_and_unload, peft_model.base_model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*flora-export build"):
            merge()
    torch.testing.assert_close(peft_model.unload()(IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_learns(model: PreTrainedModel, tmp_path: Path, checkpointing: bool) -> None:
    peft_model = adapted(model, init_ffba_weights=True, dropout=0.1)
    before = {n: p.clone() for n, p in peft_model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 16
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=4,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    changed = {n for n, p in peft_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("ffba_" in name for name in changed)
    assert len(changed) == 2 * 5


def test_gradient_checkpointing_gives_the_same_gradients(model: PreTrainedModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        peft_model = adapted(copy.deepcopy(model)).train()
        if checkpointing:
            peft_model.gradient_checkpointing_enable({"use_reentrant": False})
        peft_model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_dropout_acts_in_training_alone(model: PreTrainedModel) -> None:
    peft_model = adapted(model, dropout=0.5)
    torch.testing.assert_close(peft_model(IDS).logits, peft_model(IDS).logits, rtol=0, atol=0)
    peft_model.train()
    assert (peft_model(IDS).logits - peft_model(IDS).logits).abs().max() > 0


def test_bfloat16(base: Path) -> None:
    """The adapter stays fp32 beside a bf16 base, as PEFT keeps it; the block's output keeps the base's dtype."""
    exact = adapted(AutoModelForCausalLM.from_pretrained(base))
    model = adapted(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "ffba_" in n} == {torch.float32}
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    with exact.disable_adapter():
        effect = (exact(IDS).logits - logits.float()).abs().max()
    # 8 bits through two layers, measured 0.005; without the adapter it is off by more than 0.1
    assert (exact(IDS).logits - logits.float()).abs().max() < 0.05 < effect


def test_torch_compile(model: PreTrainedModel) -> None:
    peft_model = adapted(model)
    expected = peft_model(IDS).logits
    torch.testing.assert_close(torch.compile(peft_model)(IDS).logits, expected, rtol=0, atol=1e-5)


def test_low_cpu_memory_loading(base: Path, adapter: Path) -> None:
    plain, low = (
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=low).eval()
        for low in (False, True)
    )
    torch.testing.assert_close(low(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


def test_mixed_adapters_in_a_batch_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="does not mix adapters within a batch"):
        adapted(model, target_modules=["self_attn"])(IDS, adapter_names=["default", "other"])


def test_attributes_of_the_block_are_reached(model: PreTrainedModel) -> None:
    layer = adapted(model).base_model.model.model.layers[1]
    assert layer.self_attn.layer_idx == 1
    with pytest.raises(AttributeError):
        _ = layer.self_attn.no_such_thing


def test_gated_refuses_a_plain_mlp(bases: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases("starcoder2"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp \(Starcoder2MLP\) is not a gated MLP"):
        adapted(model, mlp_activation="gated")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 1.5}, "r is 1.5"),
        ({"rank_pattern": {"mlp": -1}}, r"rank_pattern\['mlp'\] is -1"),
        ({"attn_activation": "gated"}, "attn_activation is 'gated'"),
        ({"mlp_activation": "tanh"}, "mlp_activation is 'tanh'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_configurations(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FFBAConfig(**config)


def test_bad_targets(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="rank 65 is above the model's width 64"):
        adapted(copy.deepcopy(model), r=65)
    with pytest.raises(ValueError, match=r"beside whole blocks.*q_proj"):
        adapted(model, target_modules=["q_proj"])
