"""Other methods of PEFT, whose merged weights PEFT itself makes: W' is what `merge_and_unload()` leaves, in fp32 on the whole base model.

These methods are PEFT's own definitions, so no formula is written down a second time. The price: PEFT's merge uses matrix products, whose
last bits depend on the machine. Such a change says so (`what` names PEFT and its version, WeightChange.exact is False), and the ledger
merges again and compares within a bound. Truth is PEFT's unmerged forward pass, as always, so a merge that is wrong is caught.

What the file must hold is asked of PEFT as well: the adapter is made on the base model without memory ("meta"), and its state dict read.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flora_export.base_model import BaseModel
from flora_export.change import Doubles, WeightChange
from flora_export.checkpoint import CONFIG
from flora_export.errors import CheckpointError
from flora_export.methods.lora import is_embedding
from flora_export.methods.reading import PREFIX, Header, Promise, Tensors, check_pattern, check_selection, refuser

if TYPE_CHECKING:
    import peft

# Merging was found equal to the unmerged forward pass; projections that are drawn from a seed must be in the file (SAVED).
MERGED = (
    "ADALORA", "BOFT", "C3A", "DEFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT",
    "PVERA", "RANDLORA", "ROAD", "TINYLORA", "VBLORA", "VERA",
)  # fmt: skip
SAVED = ("PVERA", "RANDLORA", "TINYLORA", "VERA")
_SEED = (
    "draws what it multiplies by from a seed and does not save it, so another version of PyTorch may read another adapter from the same "
    "file. Where it was trained, merge it with merge_and_unload() and use that as a model of its own"
)
_INPUT = "depends on the input, so that no weights can hold it. Serve it with PEFT"
_PROMPT = "puts learned vectors before the prompt or into the cache and changes no weight. Serve it with PEFT"
MOST = 2**16  # of a rank, a block, or a number of vectors
COUNTERS = ("_step", "_seed", "_key", "tinit", "tfinal", "deltaT")  # ends of the names of what may be larger: it says how training went
# peft_type -> why it is refused. The first words are the method's name.
REFUSED = {
    "FOURIERFT": _SEED, "WAVEFT": _SEED, "UNILORA": _SEED,
    "PSOFT": "rotates singular vectors that it does not save, and whose signs depend on the LAPACK that computes them. Merge it where it "
    "was trained, with merge_and_unload()",
    "OSF": "subtracts singular vectors of the base model that it does not save, and computes anew where it is loaded. Merge it where it "
    "was trained, with merge_and_unload()",
    "FROD": "needs PEFT's joint decomposition of the base model, which is not read. Merge it in PEFT with merge_and_unload()",
    "SHIRA": "holds indices, which are not read. Merge it in PEFT with merge_and_unload()",
    "SUPERTUNING": "holds indices, which are not read. Merge it in PEFT with merge_and_unload()",
    "ADAMSS": "has not been tried. Merge it in PEFT with merge_and_unload()",
    "BEFT": "adds biases where the base model has none. Serve it with PEFT",
    "TRAINABLE_TOKENS": "has not been tried. Merge it in PEFT with merge_and_unload()",
    "LILY": _INPUT, "SHADOW": _INPUT, "XLORA": _INPUT, "POLY": _INPUT, "DUALLORA": _INPUT,
    "PROMPT_TUNING": _PROMPT, "MULTITASK_PROMPT_TUNING": _PROMPT, "P_TUNING": _PROMPT, "PREFIX_TUNING": _PROMPT, "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT, "ADAPTION_PROMPT": _PROMPT,
}  # fmt: skip


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check what PEFT would not: patterns of strangers, and what a merge leaves out. Raises CheckpointError."""
    refuse = refuser(file, config)
    kind = config["peft_type"]
    if kind in REFUSED:
        raise CheckpointError(f"{file}: peft_type is {kind!r}, which {REFUSED[kind]}.")
    if kind not in MERGED:
        raise CheckpointError(
            f"{file}: peft_type is {kind!r}, which this flora-export does not know. It reads FFBA, LORA and the methods of docs/methods.md "
            f"and has PEFT merge {', '.join(MERGED)}. Merge it with merge_and_unload(), and serve it as a model of its own."
        )
    if kind in SAVED and not config.get("save_projection", True):
        refuse("save_projection", f"{kind} without its projections {_SEED}, or save it with save_projection=True")
    for key, off in (("modules_to_save", None), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key) and config[key] != off:
            refuse(key, f"{kind} is exported for adapted weights alone. Merge it in PEFT with merge_and_unload()")
    check_selection(file, config, "module")
    for key, value in config.items():
        if not key.endswith(COUNTERS) and not _small(value):
            refuse(key, f"PEFT could count to it, or make as many numbers: a whole number from -1 to {MOST} is expected")
        for name in value if key.endswith("_pattern") and isinstance(value, dict | list) else [value] if key == "layers_pattern" else ():
            if isinstance(name, str):
                check_pattern(file, key, rf"(.*\.)?({name})$", name)
    if isinstance(config.get("feedforward_modules"), str):
        check_pattern(file, "feedforward_modules", config["feedforward_modules"], config["feedforward_modules"])


def _small(value: object) -> bool:
    """Whether no whole number in a value of JSON is large: some methods of PEFT search down or up from one until it divides a width."""
    if isinstance(value, dict | list):
        return all(map(_small, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or -1 <= value <= MOST


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The weights that PEFT's layers stand around, and the tensors that PEFT would save of them. Raises CheckpointError."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = _without_memory(path, config, base)
    state = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(model).items()}
    inner = model.base_model.model
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    tensors: Tensors = {key: (key.removeprefix(PREFIX), shape) for key, shape in state.items()}
    shared = tuple(key for key in tensors if not any(key.startswith(f"{PREFIX}{name}.") for name in layers))
    what = f"{config['peft_type']}, merged by PEFT {peft.__version__}"
    changes: list[WeightChange] = []
    wanted: list[str] = []
    merged = _once(lambda: _merge(path, base, wanted))
    for name, layer in layers.items():
        own = tuple(key for key in tensors if key.startswith(f"{PREFIX}{name}."))
        for part, _ in layer.get_base_layer().named_parameters():
            tensor = f"{name}.{part}"
            if is_embedding(name) or tensor not in base.shapes:
                raise CheckpointError(
                    f"{path / CONFIG}: target_modules selects {name}, whose {part} is an embedding, tied, or not in the base model's file. "
                    "Train without it in target_modules."
                )
            wanted.append(tensor)
            changes.append(WeightChange(tensor, what, own + shared, _derive(tensor, merged), exact=False))
    if not changes:
        raise CheckpointError(f"{path / CONFIG}: target_modules {config['target_modules']!r} selects nothing in the base model {base.name}")
    return Promise((), tuple(changes), tensors)


def _once(make: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Callable[[], Mapping[str, npt.NDArray[Any]]]:
    """Makes it when it is first asked for. One thread at a time: weights are written by several, and where two of them load a model at
    once, transformers can be left unable to tie embeddings to heads, which it turns off and on for the whole process while it loads.
    """
    lock, made = threading.Lock(), functools.cache(make)

    def get() -> Mapping[str, npt.NDArray[Any]]:
        with lock:
            return made()

    return get


def _derive(tensor: str, merged: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Callable[[Doubles, Sequence[Doubles]], Doubles]:
    """W' out of the merged model, which is made once, when its first weight is asked for."""

    def derive(weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
        values: Doubles = merged()[tensor].astype(np.float64)
        return values

    return derive


def _without_memory(path: Path, config: Mapping[str, Any], base: BaseModel) -> peft.PeftModel:
    """The adapter on the base model, on PyTorch's device "meta". Raises CheckpointError with PEFT's words where PEFT refuses."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flora_export.quiet import quiet

    try:
        with quiet():
            known = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(known, dtype=torch.float32, trust_remote_code=False)
            settings = peft.PeftConfig.from_pretrained(str(path))
            settings.inference_mode = True
            return peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    except Exception as error:  # configurations of strangers, read by the code of some thirty methods
        raise CheckpointError(f"{path / CONFIG}: PEFT cannot make this {config['peft_type']} ({type(error).__name__}: {error})") from error


def _merge(path: Path, base: BaseModel, wanted: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """What `merge_and_unload()` leaves of the base's weights, in fp32. Raises CheckpointError."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from flora_export.quiet import quiet

    try:
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(
                base.path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
            state = peft.PeftModel.from_pretrained(model, str(path)).eval().merge_and_unload(safe_merge=True).state_dict()
        return {tensor: state[tensor].float().numpy() for tensor in wanted}
    except Exception as error:
        kind = json.loads((path / CONFIG).read_text())["peft_type"]
        raise CheckpointError(f"{path}: PEFT cannot merge this {kind} ({type(error).__name__}: {error})") from error
