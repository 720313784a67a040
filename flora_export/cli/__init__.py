"""The command line. Click, and nothing else: each command calls one function and prints what it returns.

Exit codes: 0 done and verified; 1 verification failed; 2 wrong use or bad input; 3 a backend or tool is missing or failed, the machine's
memory or disk among them; 130 and 143 after Ctrl-C and SIGTERM; 141 where the reader of stdout has gone.
"""

from __future__ import annotations

import click

from flora_export import __version__
from flora_export.cli.adapter import publish_adapter, set_adapter
from flora_export.cli.bench import bench
from flora_export.cli.build import build
from flora_export.cli.convert import convert
from flora_export.cli.explain import explain
from flora_export.cli.fleet import fleet
from flora_export.cli.generate import generate
from flora_export.cli.inspect import inspect
from flora_export.cli.quantize_base import quantize_base
from flora_export.cli.rebuild import rebuild
from flora_export.cli.stopping import Commands
from flora_export.cli.triton import triton
from flora_export.cli.trust import bom, reproduce, sign
from flora_export.cli.verify import verify


@click.group(cls=Commands)
@click.version_option(__version__)
def main() -> None:
    """From a PEFT adapter (FFBA, LoRA, DoRA) to a fused or merged, verified inference artifact."""


COMMANDS = (build, verify, explain, inspect, convert, generate, bench, quantize_base, rebuild, set_adapter, triton, publish_adapter, fleet)
for command in COMMANDS:
    main.add_command(command)
for command in (sign, bom, reproduce):
    main.add_command(command)
