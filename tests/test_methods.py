"""Methods besides LoRA: each against its own forward pass, refusals, and wrong merges that the numbers catch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flora_export.base_model import load_base
from flora_export.errors import CheckpointError
from flora_export.manifest import LedgerEntry
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from tests import methods
from tests.conftest import silent
from tests.families import make_lora
from tests.mutate import edit, edit_manifest

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root, known = tmp_path_factory.mktemp("methods"), {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = methods.MADE[name][0](base, root / name)
        return known[name]

    return get


@pytest.mark.parametrize("name", methods.MADE)
def test_each_equals_its_own_forward_pass(name: str, adapters: Made, base: Path, tmp_path: Path) -> None:
    """The truth is PEFT unmerged, or the formula beside each layer where PEFT cannot load the file (formulas.py)."""
    _, count, said = methods.MADE[name]
    artifact, report = build(adapters(name), str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.numerics is not None and not report.numerics.causes
    assert min(case.largest_effect for case in report.numerics.cases) > 0.05
    assert max(case.effect_error for case in report.numerics.cases) < 1e-5
    assert report.ledger.changed_tensors_equal == len(artifact.manifest.changes) == count
    assert {change.what for change in artifact.manifest.changes} == said


@pytest.mark.parametrize("family", ["phi3", "qwen2"])  # packed projections; biases that the formulas must not scale
def test_edora_on_other_families(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases(family)
    adapter = methods.edora(base, tmp_path / "adapter", target_modules="all-linear")
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified and report.numerics is not None and not report.numerics.causes


# What a careless reader would merge: the adapter as it is, edited, and then verified against the adapter as it was.
WRONG: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("edora", "_lora_latent_mapping.weight", lambda r: torch.eye(len(r))),  # PEFT drops R
    ("melora", "lora_A.1.weight", torch.zeros_like),  # one of the small LoRAs
    ("delora", "delora_w_norm", torch.ones_like),
    ("delora", "delora_lambda", lambda strength: 1.02 * strength),
    ("dora_fork", "up_proj.weight_m_wdecomp.weight", lambda m: m / 1.02),
    ("dora_fork", "o_proj.weight_m_wdecomp.weight", lambda m: m / 1.02),
    ("lora2", "ranknum", lambda n: n + 1),  # the rank before pruning
    ("lora2", "lora_E", torch.ones_like),
    ("reslora", "0.self_attn.q_proj.loras.1.lora_B", torch.zeros_like),
]


@pytest.mark.parametrize(("name", "ending", "wrong"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_merge_is_caught(
    name: str, ending: str, wrong: Callable[[torch.Tensor], torch.Tensor], adapters: Made, base: Path, tmp_path: Path
) -> None:
    file = adapters(name) / "adapter_model.safetensors"
    tensors = {key: wrong(t) if key.endswith(ending) else t for key, t in load_file(file).items()}
    config = json.loads((adapters(name) / "adapter_config.json").read_text())
    edited = methods.save_adapter(tmp_path / "edited", config, tensors)
    build(edited, str(base), tmp_path / "out", BuildOptions(verify=False), silent)
    report = verify(tmp_path / "out", adapters(name), str(base), VerifyOptions(), silent)
    assert report.numerics is not None and report.numerics.causes, report.to_text()


def test_a_shortcut_lost_is_caught(adapters: Made, base: Path, tmp_path: Path) -> None:
    """ResLoRA merged as if each layer had its own LoRA alone."""
    out = tmp_path / "out"
    build(methods.reslora_plain(base, tmp_path / "plain"), str(base), out, BuildOptions(verify=False), silent)
    report = verify(out, adapters("reslora"), str(base), VerifyOptions(), silent)
    assert report.numerics is not None and report.numerics.causes


def test_a_shared_tensor_must_be_in_every_weight(adapters: Made, base: Path, tmp_path: Path) -> None:
    """The ledger counts: ResLoRA's first layer goes into two weights of each name."""
    artifact, report = build(adapters("reslora"), str(base), tmp_path / "out", BuildOptions(), silent)
    key = f"{methods.PREFIX}model.layers.0.self_attn.q_proj.loras.0.lora_A"
    assert artifact.manifest.checkpoint["tensors"].count(key) == 2 and report.ledger.adapter_tensors == 16
    changes = [c for c in artifact.manifest.changes if "layers.1" not in c.tensor]
    edit_manifest(tmp_path / "out", changes=changes)
    faults = verify(tmp_path / "out", None, None, VerifyOptions(), silent).ledger.faults
    assert any(f"{key}: has 1 slices in the artifact, but must have 2" in fault for fault in faults)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("reslora", {"res_flag": 1}, "res_flag is 1, but 1 .input shortcut. .* which no change of a weight can do"),
    ("reslora", {"res_flag": 3}, "middle shortcut"),
    ("reslora", {"res_flag": True}, "res_flag is True"),
    ("reslora", {"lora_num": 3}, "loras.2.lora_A is missing"),
    ("reslora", {"lora_num": 1}, "do not promise, first"),
    ("reslora", {"pre_num": -2}, "pre_num is -2"),
    ("melora", {"r": 4}, "r is 4, but must be a list"),
    ("melora", {"lora_alpha": [1]}, "as many as r has"),
    ("melora", {"r": [2, 3, 4], "lora_alpha": [1, 1, 1]}, "cannot be cut into 3 blocks"),
    ("lora2", {"lora_alpha": None}, "lora_alpha is None"),
    ("lora2", {"r": 6}, r"lora_B is \(5, 8\), but the base model and its rank need \(6, 8\)"),
    ("dora_fork", {"Wdecompose_target_modules": None}, "do not promise, first"),
    ("dora_fork", {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ("dora_fork", {"r": "4"}, "r is '4'"),
    ("delora", {"r": 5}, "but the base model and its rank need"),
    ("delora", {"bias": "all"}, "bias is 'all'"),
    ("delora", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ("delora", {"newer": 1}, "does not know what it means"),
    ("delora", {"target_modules": ["nothing"]}, "selects no linear layer"),
    ("delora", {"target_modules": ["embed_tokens"]}, "selects the embedding"),
    ("delora", {"layers_pattern": ["("]}, "no regular expression"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=str)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str, adapters: Made, base: Path, tmp_path: Path) -> None:
    config = json.loads((adapters(name) / "adapter_config.json").read_text()) | changes
    adapter = methods.save_adapter(tmp_path, config, load_file(adapters(name) / "adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(adapter, load_base(str(base)))


def test_the_authors_own_delora_is_told_apart(adapters: Made, base: Path, tmp_path: Path) -> None:
    """The same peft_type, other tensors, another meaning."""
    tensors = {
        key + ".weight" if key.endswith(("_A", "_B")) else key: t
        for key, t in load_file(adapters("delora") / "adapter_model.safetensors").items()
    }
    config = json.loads((adapters("delora") / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="DeLoRA as its authors' own code writes it"):
        load_checkpoint(methods.save_adapter(tmp_path, config, tensors), load_base(str(base)))


def test_every_module_of_an_edora_has_its_mapping(base: Path, tmp_path: Path) -> None:
    adapter = methods.edora(base, tmp_path / "one")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "0.self_attn.q_proj_lora" not in k}, file)
    with pytest.raises(CheckpointError, match="q_proj R is missing"):
        load_checkpoint(adapter, load_base(str(base)))
    saved = methods.edora(base, tmp_path / "two", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"an EDoRA .* that changes lm_head.weight .saved whole. as well"):
        load_checkpoint(saved, load_base(str(base)))


def test_what_is_plain_lora_in_the_end(base: Path, tmp_path: Path) -> None:
    """FLoRA's stacked file and OPLoRA's result are LoRAs: the stack of K clients, p_k on A, equals the weighted sum of their products."""
    clients = [make_lora(base, tmp_path / f"client{k}", seed=k, target_modules=["q_proj"]) for k in (1, 2)]
    loaded = [load_file(client / "adapter_model.safetensors") for client in clients]
    stacked = {
        key: torch.cat(
            [loaded[0][key] * (0.3 if "lora_A" in key else 1), loaded[1][key] * (0.7 if "lora_A" in key else 1)],
            0 if "lora_A" in key else 1,
        )
        for key in loaded[0]
    }
    config = json.loads((clients[0] / "adapter_config.json").read_text()) | {"r": 8, "lora_alpha": 16}
    adapter = methods.save_adapter(tmp_path / "stacked", config, stacked)
    known = load_base(str(base))
    one, *parts = (load_checkpoint(path, known) for path in (adapter, *clients))
    for i, change in enumerate(one.changes):
        weight = known.read(change.tensor)
        deltas = [part.changed(part.changes[i], weight) - weight for part in parts]
        torch.testing.assert_close(
            torch.tensor(one.changed(change, weight) - weight), torch.tensor(0.3 * deltas[0] + 0.7 * deltas[1]), rtol=1e-5, atol=1e-7
        )
    _, report = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified


BY_PEFT: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 4, "total_step": 10, "lora_alpha": 32}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 16},
    "DEFT": {}, "GLORA": {}, "GRALORA": {}, "HIRA": {}, "HRA": {}, "IA3": {"feedforward_modules": ["up_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]}, "LOHA": {}, "LOKR": {}, "MISS": {}, "OFT": {"oft_block_size": 8, "r": 0},
    "PEANUT": {}, "PVERA": {}, "RANDLORA": {}, "ROAD": {"group_size": 32}, "TINYLORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 20}, "VERA": {},
}  # fmt: skip


def by_peft(kind: str, base: Path, directory: Path, **config: Any) -> Path:
    """PEFT's own random adapter, every trained number moved."""
    torch.manual_seed(3)
    defaults = {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**(defaults | BY_PEFT[kind] | config))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", BY_PEFT)
def test_what_peft_merges(kind: str, base: Path, tmp_path: Path) -> None:
    """PEFT's merge against PEFT's unmerged forward pass in fp64; the ledger names PEFT and merges a second time."""
    adapter = by_peft(kind, base, tmp_path / "adapter")
    artifact, report = build(adapter, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.numerics is not None and not report.numerics.causes
    assert min(case.largest_effect for case in report.numerics.cases) > 0.01
    assert report.ledger.changed_tensors_near == len(artifact.manifest.changes) == (2 if kind == "LN_TUNING" else 6)
    assert {change.what for change in artifact.manifest.changes} == {f"{kind}, merged by PEFT {peft.__version__}"}
    assert report.ledger.adapter_tensors == len(load_file(adapter / "adapter_model.safetensors"))


def test_without_a_task_type(base: Path, tmp_path: Path) -> None:
    """PEFT then writes `auto_mapping`, which says nothing of the weights."""
    adapter = by_peft("LOHA", base, tmp_path, task_type=None)
    assert json.loads((adapter / "adapter_config.json").read_text())["auto_mapping"]
    assert len(load_checkpoint(adapter, load_base(str(base))).changes) == 6


def test_biases_that_peft_merges(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("qwen2")
    artifact, report = build(by_peft("IA3", base, tmp_path / "adapter"), str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified and "model.layers.0.self_attn.q_proj.bias" in {change.tensor for change in artifact.manifest.changes}


def test_a_weight_that_peft_did_not_merge_so_is_caught(base: Path, tmp_path: Path) -> None:
    """The bound of the ledger lets rounding pass, and nothing larger."""
    adapter, out = by_peft("LOHA", base, tmp_path / "adapter"), tmp_path / "out"
    build(adapter, str(base), out, BuildOptions(verify=False), silent)

    def nudge(by: float) -> list[str]:
        def change(entry: LedgerEntry, view: Any) -> None:
            if entry.origin == "changed" and "up_proj" in entry.tensor:
                view[0, 0] += by

        edit(out, change, forge=True)
        return verify(out, adapter, str(base), VerifyOptions(), silent).ledger.faults

    assert nudge(1e-7) == []
    assert len([fault for fault in nudge(1e-3) if "is not what the artifact holds" in fault]) == 2


NOT_BY_PEFT: list[tuple[str, dict[str, Any], str]] = [
    ("VERA", {"save_projection": False}, "save_projection is False, but VERA without its projections draws"),
    ("LOHA", {"peft_type": "FOURIERFT"}, "draws what it multiplies by from a seed"),
    ("LOHA", {"peft_type": "UNILORA"}, "from a seed"),
    ("LOHA", {"peft_type": "PREFIX_TUNING"}, "changes no weight"),
    ("LOHA", {"peft_type": "LILY"}, "depends on the input"),
    ("LOHA", {"peft_type": "DUALLORA"}, "depends on the input"),
    ("LOHA", {"peft_type": "PSOFT"}, "signs depend on the LAPACK"),
    ("LOHA", {"peft_type": "OSF"}, "singular vectors of the base model"),
    ("LOHA", {"peft_type": None}, "peft_type is None, but must name a method"),
    ("LOHA", {"r": 5}, r"hada_w1_a is \(64, 8\), but .* need \(64, 5\)"),
    ("LOHA", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ("LOHA", {"target_modules": ["up_proj"]}, "do not promise, first"),
    ("LOHA", {"target_modules": ["embed_tokens"]}, "PEFT cannot make this LOHA|is an embedding"),
    ("LOHA", {"rank_pattern": {"(a+)+b": 1}}, "may repeat no group"),
    ("LOHA", {"r": "many"}, "PEFT cannot make this LOHA"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), NOT_BY_PEFT, ids=str)
def test_what_peft_is_not_asked_to_merge(kind: str, changes: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    adapter = by_peft(kind, base, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(adapter, load_base(str(base)))
