"""What is installed, and for whom: the base install has what the package imports and no more; each make target installs its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGE_OF = {"mobius": "mobius-onnx", "tensorrt_rtx": "tensorrt-rtx-cu13"}  # where the two have different names
CARRIED = {"google", "tokenizers"}  # by a package that is not itself without them: protobuf by onnx, tokenizers by transformers
SERVER_SIDE = {"program", "triton_python_backend_utils"}  # imported by the program in a Triton repository, beside it
STAMPS = ("demo", "serve", "bench", "accuracy", "test")


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~ ;]", requirement)[0] for requirement in requirements}


def imported() -> set[str]:
    """The packages that flora_export imports, somewhere, as their requirements are named."""
    modules: set[str] = set()
    for file in (ROOT / "flora_export").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    third = modules - sys.stdlib_module_names - CARRIED - SERVER_SIDE - {"flora_export"}
    return {PACKAGE_OF.get(module, module.replace("_", "-")) for module in third}


def test_the_base_install_has_what_the_package_imports_and_no_more() -> None:
    base = packages(PROJECT["dependencies"])
    extras = set[str]().union(*(packages(requirements) for requirements in EXTRAS.values()))
    assert base <= imported()
    assert imported() - base <= extras
    assert not base & extras


def make(goal: str, venv: Path) -> str:
    """What make would do for a goal, the base model and the server being there."""
    command = ["make", "--dry-run", goal, f"VENV={venv}", f"BASE={venv}/base", f"SERVER={venv}/server", "PYTHON=python3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def installs(goal: str, venv: Path) -> list[str]:
    """The extras of each editable install, in order."""
    return re.findall(r"--editable '\.\[(.*)\]'", make(goal, venv))


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip("no make")
    return tmp_path / "venv"


def stamp(venv: Path, *names: str) -> None:
    """Leave an environment as `make` leaves it: stamps newer than what they depend on, and then what is made with it."""
    venv.mkdir(exist_ok=True)
    for name in (*(f"installed-{name}" for name in names), "base", "server"):
        (venv / name).touch()


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ("demo", []),
        ("serve", ["cpu,genai,triton"]),
        ("bench", ["cpu,tensorrt-rtx,genai"]),
        ("accuracy", ["cpu,accuracy,report"]),
        ("readme-tables", []),
        ("lint", ["cpu,tensorrt-rtx,openvino,qnn,genai,triton,report,accuracy,examples,dev"]),
    ],
)
def test_each_target_installs_what_it_needs(venv: Path, goal: str, expected: list[str]) -> None:
    assert installs(goal, venv) == ["cpu,examples", *expected]
    assert set(",".join(expected).split(",")) - {""} <= EXTRAS.keys()
    stamp(venv, "demo")  # after `make demo`, only what is new
    assert installs(goal, venv) == expected


@pytest.mark.parametrize("goal", ["demo", "serve", "bench", "accuracy", "lint"])
def test_after_make_test_nothing_is_installed_again(venv: Path, goal: str) -> None:
    assert [name for name in STAMPS if f"{venv}/installed-{name}" in make("lint", venv)] == list(STAMPS)
    stamp(venv, *STAMPS)
    assert "pip install" not in make(goal, venv)
    os.utime(venv / "installed-demo", (0, 0))  # pyproject.toml is newer
    assert installs(goal, venv)[0] == "cpu,examples"
