"""Hostile artifacts: manifests, graphs, tokenizers, chat templates; pickles; and repositories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.hostile_directory import (
    DEEP,
    PATHS,
    PLACES,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Case,
    Sound,
    artifact_case,
    base_case,
    code,
    copy,
    edit_json,
    paths,
    replaced,
)
from flora_export.artifact import DATA, GOLDEN, MANIFEST, MODEL
from flora_export.checkpoint import WEIGHTS


def cases() -> Iterator[Case]:
    yield from _artifacts()
    yield from _tokenizers()
    yield from _templates()
    yield from _pickles()
    yield from _repositories()


def _artifacts() -> Iterator[Case]:
    for name in PATHS:

        def named(out: Path, sound: Sound, name: str = name) -> None:
            known = {"sha256": "0" * 64, "bytes": sound.secret.stat().st_size}
            edit_json(out / MANIFEST, files=json.loads((out / MANIFEST).read_text())["files"] | {paths(sound)[name]: known})

        yield artifact_case(f"manifest files: {name}", named, "verify", sealed=False)

        def located(out: Path, sound: Sound, name: str = name) -> None:
            _relocate(out, location=paths(sound)[name])

        yield artifact_case(f"onnx location: {name}", located, "verify", (1, 2))
        yield artifact_case(f"onnx location: {name}: explain", located, "explain", (1, 2))
    numbers = (
        ("offset", str(2**63 - 1)),
        ("offset", "-1"),
        ("length", str(2**63 - 1)),
        ("length", "0"),
        ("offset", "9" * 400),
        ("length", "NaN"),
    )
    for key, value in numbers:
        yield artifact_case(f"onnx {key} {value:.20}", lambda out, _, k=key, v=value: _relocate(out, **{k: v}), "verify", (1, 2))
    for name, how in PLACES.items():
        for file in (MANIFEST, MODEL, DATA, GOLDEN, "config.json"):
            yield artifact_case(f"{file} is {name}", replaced(file, how), "verify", (1, 2), sealed=False)
    manifests: dict[str, Callable[[Path, Sound], object]] = {
        "100,000 levels": lambda out, _: (out / MANIFEST).write_text(DEEP),
        "70 MiB": lambda out, _: (out / MANIFEST).write_text(" " * (70 << 20) + "{}"),
        "an axis of 10^12": lambda out, _: _edit_entries(out, axis=10**12),
        "a stop of 10^30": lambda out, _: _edit_entries(out, stop=10**30),
        "a scale of NaN": lambda out, _: _edit_entries(out, scale=float("nan")),
        "a backend that is a module": lambda out, _: edit_json(out / MANIFEST, backend="os"),
        "a precision of its own": lambda out, _: edit_json(out / MANIFEST, precision="fp32; rm -rf"),
        "half a character": lambda out, _: edit_json(out / MANIFEST, fuse="\ud800"),
        "terminal codes": lambda out, _: _edit_entries(out, tensor="\x1b[2J\nerror: "),
    }  # fmt: skip
    for name, edit in manifests.items():
        for command in ("explain", "verify"):
            yield artifact_case(f"manifest: {name}: {command}", edit, command, (1, 2), sealed=False)


def _relocate(out: Path, **entries: str) -> None:
    import onnx

    model = onnx.load(out / MODEL, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    (out / MODEL).write_bytes(model.SerializeToString())


def _edit_entries(out: Path, **changes: Any) -> None:
    edit_json(out / MANIFEST, ledger=[entry | changes for entry in json.loads((out / MANIFEST).read_text())["ledger"]])


def _tokenizers() -> Iterator[Case]:
    def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Sound], None]:
        def edit(directory: Path, _: Sound) -> None:
            content = json.loads((directory / TOKENIZER).read_text())
            change(content)
            (directory / TOKENIZER).write_text(json.dumps(content))

        return edit

    def splits(pattern: str) -> Callable[[dict[str, Any]], object]:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return lambda content: content.update(pre_tokenizer=split)

    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    bombs: dict[str, Callable[[Path, Sound], object]] = {
        "100,000 levels": lambda directory, _: (directory / TOKENIZER).write_text(DEEP),
        "70 MiB": lambda directory, _: (directory / TOKENIZER).write_text(" " * (70 << 20) + "{}"),
        "a pattern that backtracks": edited(splits(r"(\w+\s?)+\w+\d\d\d$")),
        "a pattern of groups": edited(splits("(" * 5000 + "a" + ")" * 5000)),
        "10^6 added tokens": edited(
            lambda c: c.update(added_tokens=[{"id": 300 + i, "content": f"<{i}>"} | added for i in range(10**6)])
        ),
        "10^6 words": edited(lambda c: c["model"]["vocab"].update({f"w{i}": 300 + i for i in range(10**6)})),
        "a token of 10^12": edited(lambda c: c["model"]["vocab"].update(Hello=10**12)),
        "a normalizer that grows": edited(
            lambda c: c.update(
                normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 8}
            )
        ),
        "code of its own": lambda directory, sound: (
            edit_json(directory / TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["tok_x.T", None]}, tokenizer_class="T"),
            (directory / "tok_x.py").write_text(f"open({str(sound.ran)!r}, 'w')"),
        ),
        "files elsewhere": lambda directory, sound: edit_json(
            directory / TOKENIZER_CONFIG, vocab_file="/etc/passwd", tokenizer_file=str(sound.secret), name_or_path="/etc"
        ),
    }  # fmt: skip
    for name, edit in (bombs | {f"is {place}": replaced(TOKENIZER, how) for place, how in PLACES.items()}).items():
        yield artifact_case(f"tokenizer: {name}: generate", edit, "generate", (0, 2), sealed=not name.startswith("is "))
        yield base_case(f"tokenizer: {name}: build", edit, "build", (0, 2))


TEMPLATES = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "memory": "{{ ('a' * 10000000000) | length }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "long answer": "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 1000 }}{% endfor %}",
    "format": "{{ '%099999999999d' % 1 }}",
    "padding": "{{ 'a'.center(10000000000) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch RAN').read() }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('RAN', 'w') }}",
    "attribute filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format reaches": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '../secret' as s %}{{ s }}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes": "{{ messages.clear() }}",
    "broken": "{% for %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "refuses": "{{ raise_exception('no\n\x1b[2Jerror: none') }}",
}


def _templates() -> Iterator[Case]:
    for name, template in TEMPLATES.items():

        def edit(directory: Path, sound: Sound, template: str = template) -> None:
            (directory / TEMPLATE).unlink(missing_ok=True)
            edit_json(directory / TOKENIZER_CONFIG, chat_template=template.replace("RAN", str(sound.ran)))

        yield artifact_case(f"template: {name}: generate", edit, "generate")
    for name in ("endless", "memory", "classes"):

        def served(directory: Path, _: Sound, template: str = TEMPLATES[name]) -> None:
            (directory / TEMPLATE).write_text(template)

        yield artifact_case(f"template: {name}: triton", served, "triton", (1, 2, 3))
        yield base_case(f"template: {name}: build", served, "build", (0, 2))


def _pickles() -> Iterator[Case]:
    def make(directory: Path, sound: Sound, content: Callable[[Path, Sound], object]) -> list[str]:
        adapter = copy(sound.adapter, directory / "adapter")
        (adapter / WEIGHTS).unlink()
        content(adapter / "adapter_model.bin", sound)
        return ["convert", str(adapter), str(directory / "out")]

    contents = {
        "runs code": lambda file, sound: file.write_bytes(code(sound)),
        "runs code in a ZIP": lambda file, sound: _zipped(file, code(sound)),
        "a tensor of terabytes": lambda file, _: _expanded(file),
        "a ZIP bomb": lambda file, _: _zipped(file, b"\0" * (1 << 30)),
        "10^6 marks": lambda file, _: file.write_bytes(b"\x80\x02" + b"(" * 10**6 + b"."),
        "a list in a list": lambda file, _: file.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    } | PLACES  # fmt: skip
    for name, content in contents.items():
        yield Case(f"pickle: {name}: convert", lambda directory, sound, content=content: make(directory, sound, content))


def _zipped(file: Path, content: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def _expanded(file: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(1).expand(2**40)}, file)


def _repositories() -> Iterator[Case]:
    texts = {
        "nothing": "", "braces": "input {" * 100_000,
        "a version of 10^30": "version_policy { specific { versions: [ " + "9" * 30 + " ] } }",
        "not UTF-8": b"\xff\xfe", "a path": 'name: "../../secret" version_policy { specific { versions: [ 1 ] } }',
    }  # fmt: skip
    for name, text in texts.items():

        def make(directory: Path, sound: Sound, text: str | bytes = text) -> list[str]:
            (directory / "repo" / "decoder" / "1").mkdir(parents=True)
            content = text if isinstance(text, bytes) else text.encode()
            (directory / "repo" / "decoder" / "config.pbtxt").write_bytes(content)
            return ["triton", str(directory / "repo"), "--check"]

        yield Case(f"repository: {name}", make, (1, 2, 3))
