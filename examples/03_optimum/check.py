"""An ONNX Runtime artifact in Hugging Face's optimum: `ORTModelForCausalLM` loads OUT unchanged and gives the recorded logits.

    python examples/03_optimum/check.py OUT [--venv DIR] [--record FILE.json]

It makes an environment of its own in DIR, since optimum's pins exclude ours; about 1.3 GB, once. Exit code 1 where the logits differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from flora_export.artifact import open_artifact
from flora_export.verify.latency import environment
from flora_export.verify.numerics import TOLERANCES

HERE = Path(__file__).parent


def python_of(directory: Path) -> Path:
    """The interpreter of the environment, which is made where it is not there or not whole."""
    python = directory / "bin" / "python"
    if not (directory / "installed").is_file():
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", HERE / "requirements.txt"], check=True)
        (directory / "installed").touch()
    return python


def faults(prompts: list[dict[str, Any]], precision: str) -> list[str]:
    """What is wrong with the replayed prompts, a line each: errors beyond the tolerance that `verify` has, or other greedy tokens."""
    found = [] if prompts else ["nothing was replayed"]
    for index, prompt in enumerate(prompts):
        allowed = TOLERANCES[precision].logits * max(1.0, prompt["largest_logit"])
        if not prompt["largest_error"] <= allowed:
            found.append(f"prompt {index}: logits are off by {prompt['largest_error']:.3g} (allowed {allowed:.3g})")
        if not prompt["same_greedy_tokens"]:
            found.append(f"prompt {index}: generate() says something else")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--venv", type=Path, default=Path("build/optimum"))
    parser.add_argument("--record", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    manifest = open_artifact(options.out).manifest
    done = subprocess.run([python_of(options.venv), HERE / "replay.py", options.out], stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    wrong = faults(measured["prompts"], manifest.precision)
    result = {
        "command": f"python examples/03_optimum/check.py {options.out}",
        "what": "golden vectors of an unchanged artifact, replayed by optimum.onnxruntime.ORTModelForCausalLM",
        "artifact": {key: getattr(manifest, key) for key in ("backend", "target", "precision", "fuse")} | {"base": manifest.base["name"]},
        "passed": not wrong,
        "faults": wrong,
        **measured,
        "allowed_relative_to_largest_logit": TOLERANCES[manifest.precision].logits,
        "environment": environment(),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.record is not None:
        options.record.write_text(text)
    print(text, end="")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
