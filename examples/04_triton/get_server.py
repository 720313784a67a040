"""Lay out a Triton Inference Server that runs on this machine without a container, for tests and for trying things out.

    python examples/04_triton/get_server.py models/tritonserver

The PyPI package `nvidia-pytriton` carries a real tritonserver (2.51.0, Linux x86-64, NVIDIA's BSD licence) with its Python backend; it is
downloaded and unpacked, not installed. It has no ONNX Runtime backend: onnxruntime_backend.py stands in for it, so that a repository with
`backend: "onnxruntime"` loads as it is. Serve from NVIDIA's container, which has the real one.

The server's Python is an environment of its own: this Python backend reads arrays of NumPy 2 wrongly, and says nothing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

LOCKS = Path(__file__).parents[2] / "requirements"
PACKAGE = LOCKS / "tritonserver.txt"
PARTS = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")  # the libraries are found by their place beside the server
PYTHON = LOCKS / "triton-python.txt"  # what `generate` runs on
LOCKED = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r")
HOME = Path("pytriton/tritonserver")
VENV = Path("venv")
STAND_IN = Path(__file__).parent / "onnxruntime_backend.py"


def main(output: Path) -> None:
    home = output / HOME
    if not home.is_dir():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            print("nvidia-pytriton is for Linux on x86-64 alone: no server here, and the tests that need one are skipped")
            return
        _unpack(output)
    stub = home / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        has = ", ".join(sorted(path.name for path in stub.parents[1].iterdir()))
        sys.exit(f"nvidia-pytriton has no Python backend for Python {platform.python_version()}; it has {has}")
    ours = home / "backends" / "python" / stub.name
    if not ours.is_file():
        shutil.copyfile(stub, ours)
        for program in (ours, home / "bin" / "tritonserver"):
            program.chmod(0o755)
    (home / "backends" / "onnxruntime").mkdir(exist_ok=True)
    shutil.copyfile(STAND_IN, home / "backends" / "onnxruntime" / "model.py")
    if not (output / VENV).is_dir():
        _make_python(output / VENV)
    directory, library = sysconfig.get_config_vars("LIBDIR", "INSTSONAME")
    if subprocess.run([ours], env={"LD_LIBRARY_PATH": directory}, capture_output=True, check=False).returncode == 127:
        sys.exit(f"this Python has no shared library, which Triton's Python backend needs: install {library}")
    print(f"tritonserver is at {home / 'bin' / 'tritonserver'}")


def _make_python(directory: Path) -> None:
    unfinished = directory.with_name(directory.name + ".part")
    subprocess.run([sys.executable, "-m", "venv", "--clear", unfinished], check=True)
    subprocess.run([unfinished / "bin" / "python", "-m", "pip", "install", *LOCKED, PYTHON], check=True)
    unfinished.rename(directory)  # its python still runs there; its scripts are not used


def _unpack(output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as work:
        subprocess.run([sys.executable, "-m", "pip", "download", "--dest", work, *LOCKED, PACKAGE], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(work) / "server", [name for name in archive.namelist() if name.startswith(PARTS)])
        (Path(work) / "server").rename(output)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/tritonserver"))
