"""Runs OUT.pte in ExecuTorch's runtime, and holds it to what OUT's golden.safetensors records: greedy tokens equal, logits near.

    python examples/09_executorch/run.py OUT.pte OUT [--result FILE.json]
    python examples/09_executorch/run.py OUT.pte OUT --ask "Anna has 14 apples ..."

Exit code 1 where they are not, or where OUT.pte was not made from OUT as it lies there. The recorded tokens are the adapter's: a program of
the base model alone fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from executorch.runtime import Runtime
from transformers import AutoTokenizer, GenerationConfig

from flora_export.artifact import MANIFEST, Artifact, changed_files, open_artifact
from flora_export.base_model import file_sha256
from flora_export.errors import FloraExportError
from flora_export.verify.golden import Recorded, allowed_error, recorded_prompts
from flora_export.verify.latency import environment

PACKAGES = ("executorch", "torch", "transformers", "torchao", "numpy")


class Decoder:
    """One prompt at a time. The cache is inside the program, and the position of the first token says what of it counts."""

    def __init__(self, file: Path) -> None:
        self.program = Runtime.get().load_program(file)
        self.forward = self.program.load_method("forward")
        (self.places,) = self.program.load_method("get_max_context_len").execute([])

    def run(self, tokens: list[int], past: int) -> npt.NDArray[np.float32]:
        """Logits [vocabulary] after the last of the tokens, which follow `past` others."""
        if past + len(tokens) > self.places:
            sys.exit(f"the program's cache holds {self.places} tokens, but {past + len(tokens)} are wanted. Export with more --tokens.")
        ids = torch.tensor([tokens])
        (logits,) = self.forward.execute([ids, torch.arange(past, past + len(tokens))])
        last: npt.NDArray[np.float32] = logits[0, -1].float().numpy()
        return last


def check_origin(program: Path, artifact: Artifact) -> dict[str, Any]:
    """What export.py has recorded. Leaves where files have changed, or the program is another artifact's."""
    faults = changed_files(artifact)
    file = Path(f"{program}.json")
    if not file.is_file():
        sys.exit(f"{file} is not there: export.py writes it beside the program")
    record: dict[str, Any] = json.loads(file.read_text())
    if record["manifest_sha256"] != file_sha256(artifact.path / MANIFEST):
        faults.append(f"{program} was made from another artifact than {artifact.path}")
    if record["pte_sha256"] != file_sha256(program):
        faults.append(f"{program} is not the file that export.py wrote")
    if faults:
        sys.exit("\n".join(faults))
    return record


def replay(decoder: Decoder, artifact: Artifact, recorded: Recorded) -> dict[str, Any]:
    """Prefill, then a step for each recorded token but the last."""
    past, fed, rows = 0, recorded.ids.tolist(), []
    for token in recorded.tokens.tolist():
        rows.append(decoder.run(fed, past))
        past, fed = past + len(fed), [token]
    got = np.stack(rows)
    return {
        "prompt_tokens": len(recorded.ids),
        "steps": len(recorded.tokens),
        "same_greedy_tokens": bool((got.argmax(1) == recorded.tokens).all()),
        "largest_error": float(np.abs(got - recorded.logits).max()),
        "allowed_error": allowed_error(artifact, recorded.logits),
        "largest_logit": float(np.abs(recorded.logits).max()),
    }


def faults_of(prompts: list[dict[str, Any]]) -> list[str]:
    """A line for each thing that is wrong."""
    found = []
    for index, prompt in enumerate(prompts):
        if not prompt["same_greedy_tokens"]:
            found.append(f"golden prompt {index}: other greedy tokens than recorded")
        if not prompt["largest_error"] <= prompt["allowed_error"]:  # not a number, as well
            found.append(f"golden prompt {index}: logits are off by {prompt['largest_error']:.3g} (allowed {prompt['allowed_error']:.3g})")
    return found


def answer(decoder: Decoder, path: Path, question: str, tokens: int = 64) -> str:
    """The greedy answer, up to an end token."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    message = [{"role": "user", "content": question}]
    fed = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    end = GenerationConfig.from_pretrained(path).eos_token_id
    ends = {*end} if isinstance(end, list) else {end}
    past, said, room = 0, [], min(tokens, max(1, decoder.places - len(fed) + 1))
    while len(said) < room:
        token = int(decoder.run(fed, past).argmax())
        if token in ends:
            break
        past, fed = past + len(fed), [token]
        said.append(token)
    return str(tokenizer.decode(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ask", metavar="QUESTION", help="answer it as well; OUT must have a tokenizer with a chat template")
    parser.add_argument("--result", type=Path, help="write what was measured here, as JSON")
    options = parser.parse_args()
    try:
        artifact = open_artifact(options.out)
        made = check_origin(options.program, artifact)
        golden = recorded_prompts(artifact)
    except FloraExportError as error:
        sys.exit(str(error))
    decoder = Decoder(options.program)
    prompts = [replay(decoder, artifact, recorded) for recorded in golden]
    faults = faults_of(prompts)
    result = {
        "command": shlex.join(["python", "examples/09_executorch/run.py", *sys.argv[1:]]),
        "what": "golden vectors of a checkpoint of --backend hf, replayed by ExecuTorch's runtime: fp32, XNNPACK, static cache",
        "artifact": {key: getattr(artifact.manifest, key) for key in ("backend", "precision", "fuse")}
        | {"base": artifact.manifest.base["name"]},
        "passed": not faults,
        "faults": faults,
        "largest_error_to_largest_logit": max(prompt["largest_error"] / prompt["largest_logit"] for prompt in prompts),
        "prompts": prompts,
        "export": made,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "environment": environment(),
    }
    if options.ask:
        result["answer"] = {"question": options.ask, "text": answer(decoder, options.out, options.ask)}
    text = json.dumps(result, indent=1) + "\n"
    if options.result is not None:
        options.result.write_text(text)
    print(text, end="")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
