"""The house: a file imports only from lower floors, and the command line's help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flora_export"

# Longest prefix wins. Files of one folder may import each other.
FLOORS = {
    "flora_export": 0,
    "flora_export.errors": 0,
    "flora_export.scratch": 0,
    "flora_export.bounded": 1,
    "flora_export.quantization": 1,
    "flora_export.branch": 2,
    "flora_export.bank": 2,
    "flora_export.change": 2,
    "flora_export.base_model": 2,
    "flora_export.rotary": 2,
    "flora_export.exact": 2,
    "flora_export.quiet": 2,
    "flora_export.manifest": 3,
    "flora_export.capture_constants": 3,
    "flora_export.checkpoint": 3,
    "flora_export.weights": 3,
    "flora_export.ffba": 3,
    "flora_export.artifact": 4,
    "flora_export.methods": 4,
    "flora_export.provenance": 4,
    "flora_export.shards": 4,
    "flora_export.capture": 4,
    "flora_export.formulas": 4,
    "flora_export.mapped": 4,
    "flora_export.trust": 5,
    "flora_export.shortened": 5,
    "flora_export.reference": 5,
    "flora_export.convert": 5,
    "flora_export.openvino_ir": 5,
    "flora_export.passes": 5,
    "flora_export.ledger": 6,
    "flora_export.derivation": 7,
    "flora_export.written": 7,
    "flora_export.stacks": 7,
    "flora_export.proof": 8,
    "flora_export.backends": 8,
    "flora_export.verify": 9,
    "flora_export.explain": 9,
    "flora_export.genai": 9,
    "flora_export.generate": 10,
    "flora_export.pipeline": 10,
    "flora_export.quantized_base": 10,
    "flora_export.bench": 10,
    "flora_export.inspection": 10,
    "flora_export.rebuild": 10,
    "flora_export.runtime": 10,
    "flora_export.refill": 10,
    "flora_export.publish": 11,
    "flora_export.forecast": 11,
    "flora_export.reproduce": 11,
    "flora_export.fleet": 12,
    "flora_export.cli": 13,
}
PROGRAM = "flora_export.backends.triton.program."


def _place(module: str) -> str:
    """The floor's name that a module stands on."""
    parts = module.split(".")
    while parts and ".".join(parts) not in FLOORS:
        parts.pop()
    return ".".join(parts)


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_go_down(module: str) -> None:
    names = _modules()
    here = _place(module)
    assert here != "flora_export" or module == "flora_export", f"{module} stands on no floor: add it to FLOORS"
    for node in ast.walk(ast.parse(names[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if PROGRAM in module and node.level == 1:  # it stands elsewhere when it runs, and imports what stands beside it
                continue
            assert node.level == 0, f"{module}: imports are written in full"
            targets = [node.module] if node.module != "flora_export" else [f"flora_export.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            if target.startswith("flora_export") and target in names:
                there = _place(target)
                assert there == here or FLOORS[there] < FLOORS[here], (
                    f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})"
                )


def test_files_stay_short() -> None:
    assert {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 300} == {}


HEAVY = ("torch", "transformers", "peft", "onnxruntime", "onnx_ir", "mobius", "numpy")


@pytest.mark.parametrize(
    "arguments", [["--help"], *([c, "--help"] for c in ("build", "bench", "inspect", "triton", "fleet")), ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom flora_export.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_checkpoint_reading_imports_no_torch() -> None:
    code = "import sys, flora_export.methods.ffba\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
