"""The licence of every package of the environment, as docs/licences.md.

    make licences

What each package states of itself is read. A licence that is not a permissive one stands among the exceptions, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from packaging.utils import canonicalize_name

LIST = Path(__file__).parent.parent / "docs" / "licences.md"
PERMISSIVE = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "LLVM-exception", "MIT", "MIT-0"),
    *("MIT-CMU", "PSF-2.0", "Unlicense", "ZPL-2.1", "Zlib"),
}
SPELLINGS = {  # in the older fields of metadata, where SPDX was not asked for
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache": "Apache-2.0",  # kubernetes-validate, whose text is of 2.0
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Other/Proprietary License": "proprietary",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
FILES = "MPL-2.0 binds who passes on changed files of it; we change none, and ship none"
NVIDIA = "NVIDIA's own terms; an extra that a user chooses; no file of it is in this package"
CUDA = "NVIDIA's own terms; what the plain torch brings on Linux, where the CPU build is not had"
EXCEPTIONS = {  # package, which may be a pattern: why it is used all the same
    "atheris": "its metadata states none; its sources are Apache-2.0. A tool of the campaign",
    "certifi": FILES,
    "cuda-*": CUDA,
    "hypothesis": f"{FILES}. A tool of the campaign",
    "nvidia-*": CUDA,
    "onnxruntime-qnn": "the libraries of QNN in it are under Qualcomm's own terms (Qualcomm_LICENSE.pdf). An extra, as TensorRT is",
    "pathspec": f"{FILES}. A tool of mypy",
    "sigstore-models": "its metadata states none; the licence in it is MIT. An extra brings it",
    "tensorrt-rtx-cu13*": NVIDIA,
    "tqdm": FILES,
    "triton": "MIT; what the plain torch brings on Linux",
}
HEAD = """# Licences

What the repository's environment has, and under which licence, as each package states it; `make licences` writes this file. flora-export is
Apache-2.0 and ships none of it: pip fetches the packages. An artifact has weights, a graph and a tokenizer; an engine has what its vendor's
compiler writes; the `program/` in a Triton repository is our own.
"""
FOOT = """Used, not installed: `nvidia-pytriton` (Triton Inference Server, BSD-3-Clause), llama.cpp's converter of `llama-cpp-python` (MIT),
Debian's `libonnxruntime-dev` (MIT); with a plain torch on Linux `triton` (MIT), and `cuda-*` and `nvidia-*` (NVIDIA's own terms).
"""


def installed() -> list[importlib.metadata.Distribution]:
    """The packages of this environment, without those that a package carries inside itself."""
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return list(importlib.metadata.distributions(path=sorted(places)))


def stated(package: importlib.metadata.Distribution) -> str:
    """The licence that a package states, in SPDX's words where they are known; "none stated"."""
    metadata = package.metadata
    expression = metadata.get("License-Expression")
    classified = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    field = (metadata.get("License") or "").strip().split("\n")[0]
    return str(expression or " AND ".join(SPELLINGS.get(line, line) for line in classified) or SPELLINGS.get(field, field) or "none stated")


def environment() -> dict[str, str]:
    """The licence of each package that is installed, but for our own, and pip, which every environment has."""
    found = {canonicalize_name(package.metadata["Name"]): stated(package) for package in installed()}
    return {name: found[name] for name in sorted(found) if name not in ("flora-export", "pip")}


def permissive(licence: str) -> bool:
    return set(re.split(r"[\s()]+(?:AND|OR|WITH)?[\s()]*", licence)) - {""} <= PERMISSIVE


def excepted(name: str) -> str | None:
    return next((reason for pattern, reason in EXCEPTIONS.items() if fnmatch(name, pattern)), None)


def losses(licences: Mapping[str, str], document: str) -> list[str]:
    """What is installed and not in the document, or under a licence that is neither permissive nor excepted."""
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.*?) \|", document, re.M))
    lost = []
    for name, licence in licences.items():
        if name not in listed and excepted(name) is None:
            lost.append(f"{name} ({licence}) is not in {LIST.name}: make licences")
        elif not permissive(licence) and excepted(name) is None:
            lost.append(f"{name} is under {licence}, which is neither permissive nor excepted")
    return lost


def write(licences: Mapping[str, str]) -> str:
    rows = "".join(f"| {name} | {licence} | {excepted(name) or ''} |\n" for name, licence in licences.items())
    return f"{HEAD}\n| package | licence | |\n| --- | --- | --- |\n{rows}\n{FOOT}"


if __name__ == "__main__":
    LIST.write_text(write(environment()))
