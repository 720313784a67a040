"""What an engine is made of, for the eye: which GEMM took which adapter, and what the adapter adds to the base model's engine."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from flora_export.weights import short


def engine_lines(engine: dict[str, Any], gemms: list[dict[str, Any]]) -> list[str]:
    """Which GEMM of the engine took which adapter, in decode, and what the adapter adds to the base model's engine."""
    name = "TensorRT-RTX" if engine["flavour"] == "rtx" else "TensorRT"
    lines = [f"engine: {name} {engine['version']}, compute capability {', '.join(engine['compute_capabilities'])}"]
    for profile, bounds in sorted(engine["profiles"].items(), reverse=True):
        sizes = ", ".join(f"{key} {low} to {high} (best {best})" for key, (low, best, high) in bounds.items())
        lines.append(f"  profile {profile}: {sizes}")
    lines.append(f"  {'GEMM of a decode step':<64}  {'[in, out]':>14}  {'layers':>6}  adapters in it")
    alike = Counter(_gemm_row(gemm) for gemm in gemms if gemm["profile"] == "decode" and gemm["adapters"])
    lines += [f"  {title:<64}  {shape:>14}  {count:>6}  {adapters}" for (title, shape, adapters), count in alike.items()]
    layers = engine["layers"]
    for profile in ("prefill", "decode"):
        text = f"  {profile}: {layers['adapted']['kernels'][profile]} kernels, {layers['adapted']['gemms'][profile]} GEMMs"
        if layers["base"] is not None:
            text += f"; the base model's engine has {layers['base']['kernels'][profile]} and {layers['base']['gemms'][profile]}"
        lines.append(text)
    lines += [f"  adapter GEMM that stands alone: {layer}" for layer in layers["adapter_gemms_alone"]]
    return lines


def _gemm_row(gemm: dict[str, Any]) -> tuple[str, str, str]:
    """(block and hosts, shape, adapters) of a GEMM, the same for all layers that are built alike."""
    block = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(ffba|lora)_\w+(\.weight)?$", "", gemm["adapters"][0]).removeprefix("base_model.model."))
    hosts = sorted(short(weight) for weight in gemm["weights"] if ".ffba_" not in weight and not weight.startswith("detour_"))
    adapters = sorted(adapter.removesuffix(".weight").rpartition(".")[2] for adapter in gemm["adapters"])
    return f"{block}: {' + '.join(hosts) or 'none'}", f"[{gemm['rows']}, {gemm['columns']}]", ", ".join(adapters)
