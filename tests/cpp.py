"""Builds the C++ example, with the sanitizers that find leaks, reads past the end and undefined behaviour, and runs it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "build" / "onnxruntime"
BUILD = ROOT / "build" / "cpp-tests"
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
    if not shutil.which("cmake") or not shutil.which("c++"):
        return "no cmake or no C++ compiler"
    headers = "#include <nlohmann/json.hpp>\n#include <openssl/evp.h>\n"
    probe = subprocess.run(["c++", "-E", "-x", "c++", "-"], input=headers, capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else "no headers of nlohmann-json or OpenSSL: make cpp-dependencies installs them where it can"


def build_example() -> Path:
    """The program; a second build compiles only what has changed. Fails with the compiler's words."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", ROOT / "examples" / "cpp", "-B", BUILD, f"-DONNXRUNTIME_ROOT={RUNTIME}"]
        for command in (
            [*configure, "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={FLAGS}"],
            ["cmake", "--build", BUILD, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
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
