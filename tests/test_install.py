"""What is installed, and for whom: the base install has what the package imports and no more; each make target installs its own, locked."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.campaign.locks import REQUIREMENTS, read

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Where the two have different names.
PACKAGE_OF = {"cyclonedx": "cyclonedx-python-lib", "mobius": "mobius-onnx", "tensorrt_rtx": "tensorrt-rtx-cu13", "yaml": "pyyaml"}
# By a package that is not itself without them: protobuf by onnx, tokenizers by transformers, packageurl by cyclonedx.
CARRIED = {"google", "tokenizers", "packageurl"}
SERVER_SIDE = {"program", "triton_python_backend_utils"}  # imported by the program in a Triton repository, beside it
STAMPS = ("demo", "serve", "fleet", "bench", "accuracy", "test")
LOCKS = {path.stem: read(path) for path in REQUIREMENTS.glob("*.txt") if path.stem != "excluded"}
LOCKED_TOGETHER = (*STAMPS, "torch")  # for one environment


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
    """The lock of each install, in order."""
    return re.findall(r"--require-hashes .*?-r requirements/(\w+)\.txt", make(goal, venv))


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
        ("serve", ["serve"]),
        ("fleet", ["fleet"]),
        ("bench", ["bench"]),
        ("accuracy", ["accuracy"]),
        ("readme-tables", []),
        ("lint", ["test"]),
    ],
)
def test_each_target_installs_what_it_needs(venv: Path, goal: str, expected: list[str]) -> None:
    assert installs(goal, venv) == ["demo", *expected]
    stamp(venv, "demo")  # after `make demo`, only what is new
    assert installs(goal, venv) == expected


@pytest.mark.parametrize("goal", ["demo", "serve", "fleet", "bench", "accuracy", "lint"])
def test_after_make_test_nothing_is_installed_again(venv: Path, goal: str) -> None:
    assert [name for name in STAMPS if f"{venv}/installed-{name}" in make("lint", venv)] == list(STAMPS)
    stamp(venv, *STAMPS)
    assert "pip install" not in make(goal, venv)
    os.utime(venv / "installed-demo", (0, 0))  # pyproject.toml is newer
    assert installs(goal, venv)[0] == "demo"


def extras(stamp: str) -> list[str]:
    (names,) = re.findall(rf"^EXTRAS_{stamp} := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    return names.split()


@pytest.mark.parametrize("stamp", STAMPS)
def test_every_requirement_is_locked(stamp: str) -> None:
    requirements = [*PROJECT["dependencies"], *(requirement for extra in extras(stamp) for requirement in EXTRAS[extra])]
    versions = {locked.name: locked.version for locked in (*LOCKS[stamp], *LOCKS["torch"])}
    for requirement in map(Requirement, [*requirements, *PYPROJECT["build-system"]["requires"]]):
        if requirement.name != "flora-export":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_every_locked_line_has_hashes() -> None:
    assert {f"{lock}: {locked.name}" for lock, lines in LOCKS.items() for locked in lines if not locked.hashes} == set()
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for lines in LOCKS.values() for locked in lines for digest in locked.hashes)


def test_locks_of_one_environment_agree_and_have_the_versions_of_constraints() -> None:
    lines = {str(locked.requirement): locked for name in LOCKED_TOGETHER for locked in LOCKS[name]}
    assert all(lines[str(locked.requirement)] == locked for name in LOCKED_TOGETHER for locked in LOCKS[name])
    chosen = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for requirement in chosen:
        versions = {locked.version for locked in lines.values() if locked.name == canonicalize_name(requirement.name)}
        assert versions
        assert all(map(requirement.specifier.contains, versions)), requirement
    (torch,), (plain,) = LOCKS["torch-cpu"], (locked for locked in LOCKS["torch"] if locked.name == "torch")
    assert torch.version == f"{plain.version}+cpu"
    here = {locked.name: locked.version for locked in lines.values() if locked.here}
    ours = ("onnxruntime", "transformers", "tokenizers")
    assert {locked.name: locked.version for locked in LOCKS["triton-python"] if locked.name in ours} == {name: here[name] for name in ours}


def test_with_the_cpu_build_of_torch_no_cuda_package_is_installed() -> None:
    cuda = re.compile("nvidia-c|cuda-|triton$|torch$")
    assert {f"{stamp}: {locked.name}" for stamp in STAMPS for locked in LOCKS[stamp] if cuda.match(locked.name)} == set()
    assert {"cuda-toolkit", "triton"} <= {locked.name for locked in LOCKS["torch"]}


def test_a_file_that_is_not_the_locked_one_is_not_installed(venv: Path) -> None:
    (line,) = re.findall(r"-m (pip install .*) -r requirements/serve\.txt", make("serve", venv))  # as make installs
    wheels = venv.with_name("wheels")
    wheels.mkdir()
    wheel = wheels / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")

    def install(lock: str) -> subprocess.CompletedProcess[str]:
        file = venv.with_name("lock.txt")
        file.write_text(lock)
        command = [sys.executable, "-m", *line.split(), "--no-index", "--find-links", wheels, "--target", venv, "--upgrade", "-r", file]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    locked = f"tiny==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    assert install(locked).returncode == 0
    assert "Hashes are required" in install("tiny==1.0").stderr
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("other.py", "")
    tampered = install(locked)
    assert tampered.returncode != 0
    assert "DO NOT MATCH THE HASHES" in tampered.stderr
    assert not (venv / "other.py").exists()
