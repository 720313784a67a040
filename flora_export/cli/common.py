"""What all commands share: options, progress, JSON, and errors turned into messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flora_export.bank import LAYOUTS
from flora_export.cli.stopping import STOPPED, Stopped, leave_stdout
from flora_export.errors import FloraExportError

if TYPE_CHECKING:
    from flora_export.methods.bank import BankOptions

DIRECTORY = click.Path(path_type=Path)
# What PyTorch, ONNX Runtime and C++'s own library say of it, in errors that have no type of their own.
NO_MEMORY = ("bad_alloc", "allocate memory", "Failed to allocate", "out of memory", "can't start new thread")
LONGEST_LINE = 2000  # characters of an error

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
base_option = click.option(
    "--base",
    metavar="DIR",
    help="Base model: a directory or hub name, owner/name or owner/name@revision. Without it, the one that the adapter names.",
)
vacuous_option = click.option(
    "--allow-vacuous", is_flag=True, help="Accept an adapter with no effect of its own, such as an untrained one."
)
quick_option = click.option(
    "--quick", is_flag=True, help="Run the prompts as one batch alone, not each by itself as well; the report says so."
)
adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[=WEIGHT]",
    help="One more LoRA, added to CKPT with a weight; CKPT=WEIGHT has its own.",
)
merge_option = click.option(
    "--merge/--no-merge", default=True, show_default=True, help="Merge LoRA into the base's weights, or keep its A and B beside them."
)


def bank_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a build of several adapters that stay apart."""
    slots = click.option("--slots", type=click.IntRange(min=1), metavar="N", help="A bank of N places; the empty ones are filled later.")
    layout = click.option("--bank", "layout", type=click.Choice(LAYOUTS), help="How a bank holds its adapters; else as is faster.")
    name = click.option("--name", "names", multiple=True, metavar="NAME", help="An adapter's name in a bank, in order.")
    return name(layout(slots(command)))


def bank_of(
    ckpts: Sequence[Path], names: Sequence[str], layout: str | None, slots: int | None, weighted: Sequence[str]
) -> BankOptions | None:
    """The bank that a user wants; None of one adapter by itself."""
    from flora_export.methods.bank import BankOptions, named

    if len(ckpts) == 1 and not names and layout is None and slots is None:
        return None
    if weighted:
        raise click.UsageError("--adapter adds LoRAs up to one; the adapters of a bank stay apart: give them as CKPT...")
    return BankOptions(named(ckpts, names), layout, slots)


def weighted_adapters(ckpt: Path, others: Sequence[str]) -> tuple[Path, tuple[tuple[Path, float], ...]]:
    """The adapter CKPT, and all of them with their weights; none where it is alone and has none."""
    from flora_export.methods.weighted import read_weighted

    first, weight = read_weighted(str(ckpt))
    if not others and weight == 1.0:
        return first, ()
    return first, ((first, weight), *map(read_weighted, others))


def let_threads_sleep() -> None:
    """For what imports PyTorch to compare, not to time: its threads sleep while they wait for each other, where they would spin.

    On a core that another program wants as well, a spinning thread keeps out the very one that it waits for, and what takes seconds alone
    takes minutes. OpenMP reads the variable when PyTorch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run_command(command: Callable[[], int], as_json: bool) -> None:
    """Run a command and turn its errors into messages and exit codes."""
    try:
        code = command()
    except FloraExportError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json, getattr(error, "report", None))
    except (KeyboardInterrupt, Stopped) as stopped:
        _fail("Interrupted", STOPPED, stopped.exit_code if isinstance(stopped, Stopped) else 130, as_json)
    except click.ClickException:
        raise
    except BrokenPipeError:
        leave_stdout()
        sys.exit(128 + signal.SIGPIPE)  # as everything ends whose reader has gone
    except Exception as error:
        if isinstance(error, MemoryError):
            error.__traceback__ = error.__context__ = None  # they hold what has filled it, and saying so needs some
        if message := _of_the_machine(error):
            _fail(type(error).__name__, message, 3, as_json)
        traceback.print_exc()  # a fault of ours: show where, and do not let it pass for a failed verification
        _fail("InternalError", f"{type(error).__name__}: {error}. This is a bug in flora-export.", 3, as_json)
    else:
        sys.exit(code)


def _of_the_machine(error: Exception) -> str:
    """What to say of a file system or a memory that has refused; empty where that is not it."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f"out of memory ({text[:200] or type(error).__name__}); what was there is as it was. Free some, or take a larger machine."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or text} (errno {error.errno}). Is it a file that may be read, and is there room?"
    return ""


def _fail(kind: str, message: str, code: int, as_json: bool, report: dict[str, Any] | None = None) -> None:
    try:
        if as_json:
            print_json({"verified": False, "error": kind, "message": message, "exit_code": code} | ({"report": report} if report else {}))
        sys.stdout.flush()
    except OSError:  # what has failed is stdout itself
        leave_stdout()
    click.echo(f"error: {printable(message) if code == 1 else one_line(message)}", err=True)
    sys.exit(code)


def printable(text: str) -> str:
    """A text that may quote what strangers wrote, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(message: str) -> str:
    """The same in one line, and of a length that can be read: its beginning, and its end, where the remedy stands."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 400]} [...] {line[-400:]}"


def print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, indent=1))


def progress() -> Callable[[str, int, int], None]:
    """Says on stderr what is being done; counts in place where stderr is a terminal."""
    last = ""

    def show(what: str, done: int, of: int) -> None:
        nonlocal last
        if what != last:
            click.echo(("\n" if last and sys.stderr.isatty() else "") + f"{what} ...", err=True, nl=not sys.stderr.isatty())
            last = what
        elif sys.stderr.isatty():
            click.echo(f"\r{what} ... {done}/{of}", err=True, nl=done == of)
            last = "" if done == of else what

    return show
