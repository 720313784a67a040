"""The two flavours of TensorRT. Their Python modules have one API; this file knows where they differ."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from flora_export.errors import BackendError, FloraExportError

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}
OLDEST = 11  # major version of full TensorRT: networks are strongly typed from it on, as in TensorRT-RTX, with which all is tested


@dataclass(frozen=True)
class Flavour:
    """An imported TensorRT: `name` is tensorrt or rtx."""

    name: str
    version: str
    trt: Any

    @property
    def title(self) -> str:
        return "TensorRT-RTX" if self.name == "rtx" else "TensorRT"


def load_flavour(name: str) -> Flavour:
    """Import a flavour; `auto` takes full TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        BackendError: it is not installed, cannot be loaded, or is too old.
    """
    wanted = list(MODULES) if name == "auto" else [name]
    reasons = []
    for candidate in wanted:
        try:
            trt = importlib.import_module(MODULES[candidate])
            version = str(trt.__version__)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a missing library is an OSError
            reasons.append(f"{MODULES[candidate]}: {error}")
            continue
        if candidate == "tensorrt" and int(version.split(".", maxsplit=1)[0]) < OLDEST:
            reasons.append(f"{MODULES[candidate]} is {version}, but {OLDEST}.0 or newer is needed")
            continue
        return Flavour(candidate, version, trt)
    extras = " or ".join(f"'flora-export[{EXTRAS[candidate]}]'" for candidate in wanted)
    raise BackendError(f"backend tensorrt needs a TensorRT that can be imported ({'; '.join(reasons)}): pip install {extras}")


def machine_gpu() -> str:
    """Name of this machine's first GPU; empty where PyTorch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def machine_capability() -> str | None:
    """Compute capability of the first GPU of this machine, as "8.9"; None where PyTorch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def known_capabilities(flavour: Flavour) -> list[str]:
    """What a flavour can build for without such a GPU. Full TensorRT builds for the GPU at hand only."""
    if flavour.name != "rtx":
        return []
    names = [name[2:] for name in flavour.trt.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=lambda text: tuple(map(int, text.split("."))))


def choose_capabilities(flavour: Flavour, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The compute capabilities to build for; without any wanted, the one of this machine's GPU.

    Raises:
        BackendError: there is no GPU where one is needed.
        FloraExportError: the flavour cannot build for one that is wanted.
    """
    here, known = machine_capability(), known_capabilities(flavour)
    if not wanted and here is None:
        remedy = f"--compute-capability, one or more of {', '.join(known)}" if known else "a machine with the GPU that is to run it"
        raise BackendError(f"{flavour.title} has to know the GPU to build for, and this machine has none: give it {remedy}")
    if not wanted and flavour.name == "rtx" and here not in known:
        raise BackendError(
            f"{flavour.title} {flavour.version} does not build for this machine's GPU, of compute capability {here}; it builds for "
            f"{', '.join(known)}. Use full TensorRT, or give --compute-capability for the machine that serves."
        )
    wanted = wanted or (str(here),)
    if flavour.name != "rtx":
        if wanted != (here,):
            raise FloraExportError(
                f"{flavour.title} builds for the GPU of the machine alone, which is {here or 'none'}, but --compute-capability is "
                f"{', '.join(wanted)}. Build there, or with --trt-flavor rtx."
            )
        return wanted
    for capability in wanted:
        if capability not in known:
            raise FloraExportError(
                f"--compute-capability {capability}: {flavour.title} {flavour.version} does not build for it; it builds for "
                f"{', '.join(known)}"
            )
    return wanted
