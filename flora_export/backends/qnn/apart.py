"""host.py in a process of its own: its task, its answer, and what QNN says where it fails."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from flora_export.errors import BackendError
from flora_export.scratch import Scratch

HOST = Path(__file__).with_name("host.py")
PACKAGE = "onnxruntime-qnn"
LIMIT = 3600  # seconds for a task: SmolLM2 takes 1 to 3 minutes

_CODE = re.compile(r"Error: (QNN_\w+[^\x1b\n]*)")
_UNSUPPORTED = re.compile(r"\{ name: ([^,}]*), type: (\w+) \}")


def installed_version() -> str:
    """The version of onnxruntime-qnn. Raises BackendError where it is not there."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise BackendError(f"--backend qnn needs {PACKAGE}, which compiles contexts and simulates them: pip install 'flora-export[qnn]'")
    return importlib.metadata.version(PACKAGE)


def run_apart(task: dict[str, Any], directory: Path, limit: int = LIMIT) -> dict[str, Any]:
    """What host.py answers to a task, in a directory.

    Raises:
        BackendError: the package is missing, or QNN refuses or dies; the message has its words, and the nodes that it does not take.
    """
    installed_version()
    with Scratch("flora-export-qnn-") as name:
        given, answer = Path(name) / "task.json", Path(name) / "answer.json"
        given.write_text(json.dumps(task), encoding="utf-8")
        try:
            ran = subprocess.run(
                [sys.executable, str(HOST), str(given), str(answer)], cwd=directory, capture_output=True, text=True, errors="replace",
                timeout=limit, check=False, stdin=subprocess.DEVNULL, env=os.environ | {"TMPDIR": name},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"QNN did not end within {limit} s. Pass --no-simulate, or a smaller --prompt-tokens") from error
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found or "done" not in found:
        raise BackendError(failure(found.get("error", ""), ran.stderr, ran.returncode))
    return found


def failure(error: str, log: str, code: int) -> str:
    """In words: the nodes that QNN does not take where it names some, else what was raised, else how the process died."""
    nodes = list(dict.fromkeys(_UNSUPPORTED.findall(log)))
    if nodes:
        named = ", ".join(f"{name} ({operator})" for name, operator in nodes[:5]) + (", ..." if len(nodes) > 5 else "")
        return f"QNN's HTP does not take {len(nodes)} nodes of the graph: {named}. They would be left to the CPU, so nothing was written"
    code_of = _CODE.search(log)
    if code_of is not None:  # what is raised then says that nodes are left to the CPU
        error = code_of[1]
    if code < 0:
        return f"QNN's process died of signal {-code}. Pass --no-simulate where it was the simulator's"
    reason = error or next((line for line in reversed(log.splitlines()) if line.strip()), "") or f"its process ended with {code}"
    return f"QNN failed: {reason}. Does {PACKAGE} know this --soc-model and --htp-arch?"
