"""convert(): an adapter in a form that is not read, such as a pickle, becomes `adapter_config.json` and `adapter_model.safetensors`.

    adapter_model.bin, beside PEFT's adapter_config.json    the same tensors; a fork of PEFT saves so (DoRA, MELoRA, EDoRA)
    pytorch_model_lora.bin, reslora_config.json             ResLoRA, `peft_type` RESLORA
    pytorch_model.bin                                       LoRA², `peft_type` LORA2: its alpha is in no file, so it must be given

A pickle is read by `torch.load(weights_only=True)`, which runs none of its code. The result is read by the project's own reader as far as
the configuration goes; the base model is compared when it is built.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_export.artifact import staged, writing
from flora_export.base_model import read_json
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.errors import CheckpointError
from flora_export.methods import read_config
from flora_export.methods.lora2 import INNER
from flora_export.methods.reading import MAX_WEIGHT_BYTES, PICKLE, PREFIX, number

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

RESLORA_WEIGHTS, RESLORA_CONFIG, WHOLE = "pytorch_model_lora.bin", "reslora_config.json", "pytorch_model.bin"
_LORA2 = re.compile(r"(?P<module>.+)\.(?P<name>lora_A|lora_B|lora_E|lora_aa|lora_bb|ranknum)")
_RESLORA = re.compile(r"(?P<module>.+)\.loras\.(?P<index>\d{1,4})\.lora_[AB]")


@dataclass(frozen=True)
class Converted:
    """What was written: the method, how many tensors, and how many of the source were left out."""

    output: str
    method: str
    tensors: int
    left_out: int


def convert(source: Path, output: Path, alpha: float | None, base: str | None) -> Converted:
    """Convert an adapter's directory. The output appears whole, or not at all.

    `alpha` is for formats that do not hold theirs, `base` the base model to name where the source names none.

    Raises:
        CheckpointError: the source is no adapter that is known, cannot be read without running code, or is incomplete.
        ArtifactError: the output exists, or cannot be written there.
    """
    from safetensors.torch import save_file

    if not source.is_dir():
        raise CheckpointError(f"{source}: no such adapter directory")
    with staged(output, force=False) as directory:
        tensors, config, left_out = _read(source, alpha)
        if sum(tensor.nbytes for tensor in tensors.values()) > MAX_WEIGHT_BYTES:
            raise CheckpointError(f"{source}: more than {MAX_WEIGHT_BYTES} bytes; no adapter is that large")
        if base is not None:
            config["base_model_name_or_path"] = base
        with writing(output):
            (directory / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            save_file({key: tensors[key].detach().contiguous().clone() for key in sorted(tensors)}, directory / WEIGHTS)
        try:
            read_config(directory)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {str(error).removeprefix(f'{directory / CONFIG}: ')}") from error
    return Converted(str(output), str(config["peft_type"]), len(tensors), left_out)


def _read(source: Path, alpha: float | None) -> tuple[Tensors, dict[str, Any], int]:
    """Tensors and configuration in the form that is written, and how many tensors are left out."""
    if (source / RESLORA_WEIGHTS).is_file():
        return _reslora(source)
    if (source / WEIGHTS).is_file():
        raise CheckpointError(f"{source}: holds {WEIGHTS} already. Build it as it is; `flora-export inspect` says what it is.")
    if (source / CONFIG).is_file() and (source / PICKLE).is_file():
        config = read_json(source / CONFIG, "adapter configuration")
        return _unpickled(source / PICKLE), config, 0
    if (source / WHOLE).is_file():
        return _lora2(source / WHOLE, alpha)
    raise CheckpointError(
        f"{source}: no adapter that can be converted. Expected {CONFIG} and {PICKLE}, or {RESLORA_WEIGHTS} and {RESLORA_CONFIG} (ResLoRA), "
        f"or {WHOLE} (LoRA²)."
    )


def _reslora(source: Path) -> tuple[Tensors, dict[str, Any], int]:
    given = read_json(source / RESLORA_CONFIG, "ResLoRA configuration")
    loaded = _unpickled(source / RESLORA_WEIGHTS)
    found = {key: _RESLORA.fullmatch(key) for key in loaded}
    unknown = sorted(key for key, match in found.items() if match is None)
    if unknown or not found:
        first = (unknown or ["nothing"])[0]
        raise CheckpointError(f"{source / RESLORA_WEIGHTS}: {first}, but <module>.loras.<i>.lora_A or lora_B is expected")
    matched = [match for match in found.values() if match is not None]
    config = {
        "peft_type": "RESLORA",
        "base_model_name_or_path": None,
        "r": given.get("rank"),
        "lora_alpha": given.get("lora_alpha"),
        "res_flag": given.get("res_flag", 0),
        "merge_flag": given.get("merge_flag", 0),
        # The authors' code turns -1 into 999 before it saves.
        "pre_num": given.get("pre_num", 0),
        "lora_num": 1 + max(int(match["index"]) for match in matched),
        "target_modules": sorted({match["module"] for match in matched}),
    }
    return {PREFIX + key: tensor for key, tensor in loaded.items()}, config, 0


def _lora2(file: Path, alpha: float | None) -> tuple[Tensors, dict[str, Any], int]:
    loaded = _unpickled(file)
    matched = {key: match for key in loaded if (match := _LORA2.fullmatch(key)) is not None}
    modules = sorted({match["module"] for match in matched.values() if match["name"] == "lora_aa"})
    if not modules:
        raise CheckpointError(f"{file}: no LoRA² (no <module>.lora_aa). A model that is saved whole is a base model, not an adapter.")
    ranks = {len(e) if (e := loaded.get(f"{module}.lora_E")) is not None and e.ndim == 2 else 0 for module in modules}
    if len(ranks) != 1 or 0 in ranks:
        raise CheckpointError(f"{file}: lora_E of one rank for every module is expected, but the ranks are {sorted(ranks)} (0: missing)")
    if alpha is None or not number(alpha):
        raise CheckpointError(
            f"{file}: LoRA² keeps its alpha in the training script alone. Pass --alpha, as it was trained (`lora_alpha`; where that was "
            f"0, its rank, {ranks.pop()})."
        )
    kept = {PREFIX + key: loaded[key] for key, match in matched.items() if match["module"] in modules}
    for module in modules:
        inner = loaded.get(f"{module}.lora_A")
        if inner is None or inner.ndim != 2 or inner.shape[0] != INNER:
            raise CheckpointError(
                f"{file}: {module}.lora_A is {'missing' if inner is None else tuple(inner.shape)}, but ({INNER}, in) is expected"
            )
        key = f"{PREFIX}{module}.ranknum"
        if key in kept and kept[key].numel() == 1:  # an integer, or without a dimension, as scripts have it
            kept[key] = kept[key].float().reshape(1)
    config = {
        "peft_type": "LORA2", "base_model_name_or_path": None, "r": ranks.pop(), "lora_alpha": alpha, "target_modules": modules
    }  # fmt: skip
    return kept, config, len(loaded) - len(kept)


def _check_unpacked(file: Path) -> None:
    """Raises ValueError: a ZIP that is larger when it is unpacked, where torch.save packs nothing."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > file.stat().st_size:
            raise ValueError(f"it would be {size} bytes when it is unpacked")


def _unpickled(file: Path) -> Tensors:
    """The tensors of a pickle, none of its code run. Raises CheckpointError."""
    import torch

    try:
        _check_unpacked(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that it may not know: then it refuses
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling what a stranger wrote can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"{file}: cannot be read without running code of its own ({type(error).__name__}: {reason[:200]}). Load it where it was made, "
            "and save its tensors alone."
        ) from error
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in loaded.items()):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, but tensors by name were expected. Save the state dict alone.")
    for key, tensor in loaded.items():  # a few bytes can say that they are a tensor of terabytes, each number the same
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{file}: {key} is no plain tensor of {tuple(tensor.shape)}. Save it with .contiguous(), unquantized.")
    return dict(loaded)
