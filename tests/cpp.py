"""Builds the C++ example, with the sanitizers that find leaks, reads past the end and undefined behaviour, and runs it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flora_export.backends import Runner

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "build" / "onnxruntime"
BUILD = ROOT / "build" / "cpp-tests"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = "-Werror -fsanitize=address,undefined -fno-sanitize-recover=all"


@dataclass(frozen=True)
class Ran:
    code: int
    tokens: list[list[int]]  # of each prompt
    messages: str


def what_is_missing() -> str | None:
    """Why the example cannot be built here, or None."""
    if not (RUNTIME / "include" / "onnxruntime_cxx_api.h").is_file() or not (RUNTIME / "lib" / "libonnxruntime.so").exists():
        return f"no ONNX Runtime for C++ in {RUNTIME}: make cpp-dependencies gets it where it can"
    if not shutil.which("cmake"):
        return "no cmake"
    if compiler() is None:
        return f"none of {', '.join(COMPILERS)} links a C++ program with nlohmann-json and OpenSSL: make cpp-dependencies installs them"
    return None


@cache
def compiler() -> str | None:
    """The first compiler that makes a program with the example's libraries, which `CXX=gcc` or an odd `c++` in the path does not."""
    program = '#include <nlohmann/json.hpp>\n#include <openssl/evp.h>\nint main() { return nlohmann::json::parse("0").get<int>(); }\n'
    for name in filter(shutil.which, COMPILERS):
        with tempfile.TemporaryDirectory() as directory:
            command = [name, "-x", "c++", "-", "-o", f"{directory}/probe", *FLAGS.split(), "-lcrypto"]
            if subprocess.run(command, input=program, capture_output=True, text=True, check=False).returncode == 0:
                return name
    return None


def build_example() -> Path:
    """The program, and beside it flora-fuzz; a second build compiles only what has changed. Fails with the compiler's words."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = ["-S", ROOT / "examples" / "cpp", "-B", BUILD]
        configure = ["cmake", *source, f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DONNXRUNTIME_ROOT={RUNTIME}", "-DFLORA_FUZZ=ON"]
        machine = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS", "LDFLAGS")}
        for command in (
            [*configure, "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={FLAGS}"],
            ["cmake", "--build", BUILD, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=machine)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "flora-decode"


def decode(program: Path, out: Path, *options: object, prompts: Sequence[Sequence[int]] = ()) -> Ran:
    """Run the program on an artifact."""
    arguments = [word for prompt in prompts for word in ("--prompt", ",".join(map(str, prompt)))]
    command = [str(program), str(out), *map(str, options), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"ASAN_OPTIONS": "exitcode=99"}
    )
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
    return Ran(done.returncode, [[int(word) for word in line.split()] for line in done.stdout.splitlines()], done.stderr)


def greedy(decoder: Runner, prompt: list[int], steps: int) -> list[int]:
    """Greedy tokens of the artifact in Python, up to an end token (2, in the tiny models)."""
    tokens = [int(decoder.start([prompt])[0][-1].argmax())]
    while tokens[-1] != 2 and len(tokens) < steps:
        tokens.append(int(decoder.step(tokens[-1:])[0].argmax()))
    return tokens[: tokens.index(2)] if 2 in tokens else tokens
