"""Options of backends that compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

flavour_option = click.option(
    "--trt-flavor",
    type=click.Choice(["auto", "tensorrt", "rtx"]),
    default="auto",
    show_default=True,
    help="Full TensorRT, or TensorRT-RTX; auto takes the first that is installed.",
)
capability_option = click.option(
    "--compute-capability", metavar="N.N,...", help="GPUs to build for, such as 8.6,8.9. Without it, this machine's."
)
engine_cache_option = click.option(
    "--engine-cache/--no-engine-cache", default=True, show_default=True, help="Take an engine from an equal build before."
)
context_options = (
    click.option(
        "--soc-model", type=click.IntRange(min=1), metavar="N", help="QNN: the chip, by Qualcomm's number; 69 where none is named."
    ),
    click.option("--htp-arch", type=click.IntRange(min=60), metavar="N", help="QNN: the chip's Hexagon version, such as 79."),
    click.option(
        "--share-weights/--no-share-weights", default=None, help="QNN: one binary for prefill and decode; it cannot be simulated."
    ),
    click.option("--simulate/--no-simulate", default=True, show_default=True, help="QNN: run a few steps in its simulator of the HTP."),
)

_OPTIONS = (
    flavour_option,
    capability_option,
    click.option(
        "--profile",
        multiple=True,
        metavar="NAME=MIN:OPT:MAX",
        help="Shapes of the engine: prompt, past and batch, as in 'prompt=1:128:2048 batch=1:1:8'.",
    ),
    click.option(
        "--kv-cache",
        default="growing",
        show_default=True,
        metavar="growing|static:N",
        help="A static cache has N places. QNN's is always static, of 512 unless told.",
    ),
    click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="Scratch memory that a kernel may take, in MiB."),
    click.option("--timing-cache", type=click.Path(dir_okay=False), help="File of kernel timings to use and add to."),
    click.option("--version-compatible", is_flag=True, help="An engine that later versions of TensorRT load."),
    click.option("--refittable", is_flag=True, help="An engine whose weights can be exchanged; needs a GPU."),
    click.option("--compare-base/--no-compare-base", default=True, show_default=True, help="Build the base model's engine as well."),
    engine_cache_option,
    click.option("--prompt-tokens", type=click.IntRange(min=2), metavar="N", help="QNN: tokens of prefill; 128 unless told otherwise."),
    *context_options,
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options of an engine, for a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def rebuild_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that a rebuild takes: what the engine is made with and for."""
    for option in reversed((flavour_option, capability_option, engine_cache_option, *context_options)):
        command = option(command)
    return command


def given_options(context: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the user gave: what is silent is the backend's to choose, and it refuses what is not for it."""
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in values.items() if context.get_parameter_source(name) != default}
