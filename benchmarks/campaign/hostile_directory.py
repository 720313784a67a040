"""A hostile directory and the command that is given it: what all kinds of them are made with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.artifact import open_artifact, seal

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SECRET = "the-secret-of-another-directory"
DEEP = "[" * 100_000 + "]" * 100_000

Edit = Callable[[Path, "Sound"], object]


@dataclass(frozen=True)
class Sound:
    """What is harmless, and copied: a base model with a tokenizer, an adapter for it, and what they are built into. `secret` is a file
    outside of all of them; `ran` does not exist, and what runs code makes it."""

    base: Path
    adapter: Path
    out: Path
    secret: Path
    ran: Path


@dataclass(frozen=True)
class Case:
    """`make` writes into an empty directory and returns the arguments of `flora-export`. Code 1 is a verification that failed."""

    name: str
    make: Callable[[Path, Sound], list[str]]
    codes: tuple[int, ...] = (2,)


def paths(sound: Sound) -> dict[str, str]:
    return {
        "../secret": "../secret", "absolute secret": str(sound.secret), "/etc/passwd": "/etc/passwd",
        "deep traversal": "../" * 20 + "etc/passwd", "inner traversal": f"x/../../{sound.secret.name}", "dots": "..", "nothing": "",
        "NUL": "a\0b", "long": "x" * 5000, "device": "/dev/zero", "environment": "/proc/self/environ",
    }  # fmt: skip


PATHS = (
    "../secret",
    "absolute secret",
    "/etc/passwd",
    "deep traversal",
    "inner traversal",
    "dots",
    "nothing",
    "NUL",
    "long",
    "device",
    "environment",
)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def adapter_case(name: str, edit: Edit, command: str = "inspect", codes: tuple[int, ...] = (2,)) -> Case:
    def make(directory: Path, sound: Sound) -> list[str]:
        adapter = copy(sound.adapter, directory / "adapter")
        edit(adapter, sound)
        output = ["--backend", "onnxruntime", "--output", str(directory / "out")] if command == "build" else []
        return [command, str(adapter), "--base", str(sound.base), *output]

    return Case(name, make, codes)


def base_case(name: str, edit: Edit, command: str = "inspect", codes: tuple[int, ...] = (2,)) -> Case:
    def make(directory: Path, sound: Sound) -> list[str]:
        base = copy(sound.base, directory / "base")
        edit(base, sound)
        output = ["--backend", "onnxruntime", "--output", str(directory / "out")] if command == "build" else []
        return [command, str(sound.adapter), "--base", str(base), *output]

    return Case(name, make, codes)


def artifact_case(name: str, edit: Edit, command: str, codes: tuple[int, ...] = (2,), *, sealed: bool = True) -> Case:
    """`sealed`: hashes agree with the change, as a careful forger would have them."""

    def make(directory: Path, sound: Sound) -> list[str]:
        out = copy(sound.out, directory / "out")
        edit(out, sound)
        if sealed:
            seal(out, open_artifact(out).manifest)
        more = {"generate": ["Hello", "--max-new-tokens", "3"], "triton": [str(directory / "repo")]}.get(command, [])
        return [command, str(out), *more]

    return Case(name, make, codes)


def replaced(name: str, how: Edit) -> Edit:
    """The file of that name is gone, and something else is made in its place."""

    def edit(directory: Path, sound: Sound) -> None:
        (directory / name).unlink(missing_ok=True)
        how(directory / name, sound)

    return edit


# In the place of a file. What a link leads to may be read, as the hub's cache has it, but nothing of it may be shown.
PLACES: dict[str, Callable[[Path, Sound], object]] = {
    "a FIFO": lambda file, _: os.mkfifo(file),
    "a link to the secret": lambda file, sound: file.symlink_to(sound.secret),
    "a link to /etc/passwd": lambda file, _: file.symlink_to("/etc/passwd"),
    "a link to itself": lambda file, _: file.symlink_to(file.name),
    "a link to a device": lambda file, _: file.symlink_to("/dev/zero"),
    "a link to memory": lambda file, _: file.symlink_to("/proc/self/mem"),
    "a directory": lambda file, _: file.mkdir(),
    "9 GiB of holes": lambda file, _: sparse(file, 9 * 2**30),
}


def sparse(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


def code(sound: Sound) -> bytes:
    """A pickle that runs code."""
    return f"cos\nsystem\n(S'touch {sound.ran}'\ntR.".encode()


def sound_files(directory: Path) -> Sound:
    """Makes what the cases copy: a tiny model that speaks, an adapter, and an artifact of both."""
    from flora_export.pipeline import BuildOptions, build
    from tests.families import make_adapter, make_speaking_base

    base = make_speaking_base(directory / "base")
    adapter = make_adapter(base, directory / "adapter")
    (directory / "secret").write_text(SECRET)
    (directory / "cases").mkdir()
    (directory / "cases" / "secret").write_text(SECRET)
    build(adapter, str(base), directory / "out", BuildOptions(), lambda *_: None)
    return Sound(base, adapter, directory / "out", directory / "secret", directory / "ran")
