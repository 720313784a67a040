"""Hostile variants of a file: its structure is kept and what stands in it is changed, or its bytes are."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

RAW = "\x00raw:"  # begins a text that is written without its quotation marks: what json.dumps would not write
DEEP = RAW + "[" * 3000 + "]" * 3000
PATHS = ("..", "../../../../etc/passwd", "/etc/passwd", "/proc/self/environ", "a/../../b", "C:\\x", "a\x00b", "file:///etc/passwd", "")
TEXTS = (
    *PATHS, "x" * 5000, "\ud800", "\x1b[2J\nerror: none", "__class__", "{0.__class__.__mro__}", "%s%n", "(a+)+$", "(.*a){30}", "\u202e",
    "os", "model.onnx.data", "manifest.json", "0", "-1", "1e400", "4" * 5000, "NaN",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 127, 128, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**12, 10**30,
    10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [{}],
    {"": None},
    {"a": {"a": {}}},
    [1, "a", None],
    [0] * 300,
    RAW + "1e400",
    RAW + "9" * 5000,
    DEEP,
)
Mutate = Callable[[random.Random, bytes], bytes]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, moved, repeated or cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(7)
        length = min(len(out) - at, rng.choice((1, 2, 4, 8, 64)))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            out[at:at] = rng.randbytes(length)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[at : at + length] * rng.choice((1, 3))
        elif kind == 5:
            out[at : at + 8] = struct.pack("<Q", abs(int(rng.choice(NUMBERS[:22]))) % 2**64)
        else:
            out = out[:at]
    return bytes(out)


def hostile_value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A few values, keys or items changed; now and then a key that is there twice, or broken bytes."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, data)
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        _edit(rng, root)
    try:
        text = json.dumps(root[0])
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    text = re.sub(rf'"{re.escape(json.dumps(RAW)[1:-1])}([^"]*)"', r"\1", text)
    if rng.random() < 0.05 and (keys := re.findall(r'"([^"\\]{1,40})": ', text)):
        again = f'{{"{rng.choice(keys)}": {json.dumps(rng.choice(NUMBERS[:20]))}, '
        text = text.replace("{", again, 1)
    return text.encode("utf-8", "surrogatepass")


def _edit(rng: random.Random, root: list[Any]) -> None:
    """One change, at a node that is found by walking down at random."""
    node: Any = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.25:
            break
        node = node[key]
    kind = rng.randrange(7)
    if kind <= 2 or node is root:
        node[key] = hostile_value(rng)
    elif kind == 3:
        del node[key]
    elif kind == 4 and isinstance(node, dict):
        node[str(rng.choice(TEXTS)) if rng.random() < 0.5 else rng.choice(keys)] = node.pop(key)
    elif kind == 4:
        node.append(node[key])
    elif kind == 5:
        node[key] = rng.choice(([node[key]], {"a": node[key]}, str(node[key])[:1000]))
    else:
        other = rng.choice(keys)
        node[key], node[other] = node[other], node[key]


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header is changed as JSON, and its length mostly agrees."""
    if len(data) < 8 or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, body = mutate_json(rng, data[8 : 8 + size]), data[8 + size :]
    length = len(header) if rng.random() < 0.9 else abs(int(rng.choice(NUMBERS[:22]))) % 2**64
    if rng.random() < 0.2:
        body = mutate_bytes(rng, body)
    return struct.pack("<Q", length) + header + body


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Words, numbers and quoted texts are replaced, and lines repeated; for XML a declaration of entities."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    text = data.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(re.finditer(r'"[^"]*"|-?\d+|\w+|<[^>]*>', text))
        if not found:
            break
        match, other = rng.choice(found), rng.choice(found)
        value = rng.choice((other[0], str(rng.choice(NUMBERS)), json.dumps(rng.choice(TEXTS)), match[0] * 2, ""))
        if match[0].startswith('"') and rng.random() < 0.5:
            value = f'"{rng.choice(NUMBERS)}"'
        text = text[: match.start()] + value + text[match.end() :]
    if rng.random() < 0.05:
        bomb = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "e"}">' for i in range(12))
        text = f'<!DOCTYPE net [{bomb}<!ENTITY x SYSTEM "file:///etc/passwd">]>' + text.replace('"f32"', '"&e11;&x;"')
    return text.encode("utf-8", "surrogatepass")


def mutate_onnx(rng: random.Random, data: bytes) -> bytes:
    """Fields of the initializers are changed: shapes, types, names, and where their numbers lie."""
    import onnx
    from google.protobuf.message import DecodeError

    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tensors = list(model.graph.initializer)
        if not tensors:
            model.graph.initializer.add(name="w")
            continue
        tensor, number = rng.choice(tensors), int(rng.choice(NUMBERS[:19]))
        kind = rng.randrange(8)
        if kind == 0:
            tensor.dims[:] = [max(-(2**63), min(2**63 - 1, number)), *tensor.dims][: rng.randrange(6)]
        elif kind == 1:
            tensor.data_type = rng.randrange(-1, 30)
        elif kind == 2:
            tensor.name = rng.choice((*(t.name for t in tensors), "", "x" * 300, "\x1b[2J"))
        elif kind == 3:
            tensor.raw_data = rng.randbytes(rng.randrange(80))
        elif kind == 4:
            tensor.data_location = rng.choice((0, 1))
        elif kind == 5:
            tensor.external_data.add(key=rng.choice(("location", "offset", "length", "checksum", "")), value=rng.choice(PATHS))
        elif kind == 6:
            model.graph.initializer.add().CopyFrom(tensor)
        else:
            for entry in tensor.external_data:
                if rng.random() < 0.6:
                    paths = rng.choice(PATHS) if entry.key == "location" else str(number)
                    entry.value = paths
    return bytes(model.SerializeToString())


def mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """The files inside of a ZIP, as torch.save writes it, are changed, and their sums agree."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:
        return mutate_bytes(rng, data)
    if rng.random() < 0.15 or not members:
        return mutate_bytes(rng, data)
    name = rng.choice(list(members))
    pickles = [each for each in members if each.endswith(".pkl")]
    chosen = pickles[0] if pickles and rng.random() < 0.8 else name
    members[chosen] = mutate_bytes(rng, members[chosen])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return out.getvalue()
