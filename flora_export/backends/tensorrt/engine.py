"""Build an engine from a lowered ONNX file. One code path for both flavours of TensorRT."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_export.backends.tensorrt.flavour import Flavour
from flora_export.backends.tensorrt.plan import EngineOptions, Profile
from flora_export.errors import BackendError
from flora_export.manifest import Tensor

LISTING = "Layers:"  # how the message begins in which the builder lists an engine's layers


@dataclass
class Log:
    """What TensorRT says while it works."""

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    def take(self, severity: int, message: str) -> None:
        if message.startswith(LISTING):
            self.layers += message
        elif severity <= 1:  # error, internal error
            self.errors.append(message)


_LOGGERS: dict[str, Any] = {}  # by flavour: TensorRT keeps the first logger that it is given for the life of the process


@contextlib.contextmanager
def logged(flavour: Flavour) -> Iterator[tuple[Any, Log]]:
    """(the flavour's logger, what it is told within the block)."""
    if flavour.name not in _LOGGERS:

        class Logger(flavour.trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                flavour.trt.ILogger.__init__(self)
                self.current = Log()

            def log(self, severity: Any, message: str) -> None:
                self.current.take(int(severity.value), message)

        _LOGGERS[flavour.name] = Logger()
    logger = _LOGGERS[flavour.name]
    logger.current = Log()
    yield logger, logger.current


def build_engine(
    flavour: Flavour,
    model: Path,
    inputs: Sequence[Tensor],
    profiles: Sequence[Profile],
    capabilities: Sequence[str],
    options: EngineOptions,
) -> tuple[bytes, str]:
    """Build an engine, and return it with the builder's list of its layers.

    Raises:
        BackendError: the parser or the builder refuses; the message has the ONNX node, TensorRT's reason and the remedy.
    """
    trt = flavour.trt
    with logged(flavour) as (logger, log), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = trt.Builder(logger)
        builder.max_threads = os.cpu_count() or 1
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(model)):
            raise BackendError(_refusal(flavour, parser))
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if flavour.name == "rtx":
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
        for flag, wanted in (("VERSION_COMPATIBLE", options.version_compatible), ("REFIT", options.refittable)):
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        for profile in profiles:
            shapes = builder.create_optimization_profile()
            for tensor in inputs:
                shapes.set_shape(tensor.name, *(profile.shape(tensor, which) for which in range(3)))
            config.add_optimization_profile(shapes)
        with _timing_cache(config, options.timing_cache):
            engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise BackendError(_failure(flavour, log))
        return bytes(engine), log.layers


@contextlib.contextmanager
def _timing_cache(config: Any, file: str | None) -> Iterator[None]:
    """Use a file of kernel timings, and keep what the build adds."""
    if file is None:
        yield
        return
    path = Path(file)
    try:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, False)
        yield
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(bytes(config.get_timing_cache().serialize()))
        part.replace(path)
    except OSError as error:
        raise BackendError(f"--timing-cache {path}: cannot be read or written ({error.strerror})") from error


def _refusal(flavour: Flavour, parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    first = errors[0]
    more = f"; and {len(errors) - 1} more nodes" if len(errors) > 1 else ""
    return (
        f"{flavour.title} {flavour.version} cannot parse node {first.node_name() or first.node()} ({first.node_operator()}): "
        f"{first.desc().strip()}{more}. `flora-export explain --lint` names what TensorRT does not take."
    )


def _failure(flavour: Flavour, log: Log) -> str:
    reason = re.sub(r"\s+", " ", log.errors[-1]) if log.errors else "no reason given"
    remedy = "Is the driver new enough, and the precision one that the GPU has?"
    if "workspace" in reason.lower() or "memory" in reason.lower():
        remedy = "Allow a larger --workspace, or narrow --profile."
    elif "CUDA_SUCCESS" in reason or "cuda" in reason.lower():
        remedy = "This needs a GPU in the building machine: leave out --refittable, or build where there is one."
    return f"{flavour.title} {flavour.version} could not build the engine: {reason}. {remedy}"
