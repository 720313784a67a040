"""Options of artifacts whose weights are int4 or int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_BASE = (
    click.option(
        "--block-size", type=int, metavar="N", help="int4, int8: inputs that share a scale: 16, 32, 64, 128 or 256; 32 by default."
    ),
    click.option(
        "--head-precision", type=click.Choice(["int8", "int4", "keep"]), help="int4, int8: of embeddings and head; int8 by default."
    ),
)
_ADAPTER = (
    click.option(
        "--adapter-precision",
        type=click.Choice(["same", "int8", "keep"]),
        help="int4, int8: of A, B and G. same (default): as their hosts, and fused; int8, keep: beside them.",
    ),
)

loss_option = click.option(
    "--max-quantization-loss",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="int4, int8: fail where the answers move by more, in nats per token (KL divergence), from the model as it was trained.",
)


def quantization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options of quantization, for a command."""
    for option in reversed((*_BASE, *_ADAPTER)):
        command = option(command)
    return command


def base_quantization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that say what becomes of the base model."""
    for option in reversed(_BASE):
        command = option(command)
    return command
