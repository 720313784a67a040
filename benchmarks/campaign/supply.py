"""Supply chain: what is installed is what is locked, and under which licences; at run time nothing is fetched and no foreign code runs.

The commands run in a network namespace without any interface, under strace, on a base model that has beside it what a careless loader would
run: modules that its `auto_map` names, and pickles.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from benchmarks import licences
from benchmarks.campaign.locks import REQUIREMENTS, installed_by, read
from benchmarks.campaign.outcome import Outcome, Size

ROOT = Path(__file__).parents[2]
SMOLLM2, ADAPTER = ROOT / "models" / "smollm2", ROOT / "examples" / "01_train_ffba" / "adapter"
NO_NETWORK = ("unshare", "--net", "--map-root-user")
TRACE = ("strace", "--follow-forks", "--seccomp-bpf", "--string-limit=400", "--trace=connect,open,openat,execve")
PROGRAM = """
import json, sys
from flora_export.cli import main
for done, arguments in enumerate(json.loads(sys.argv[1]), 1):
    try:
        main(arguments, standalone_mode=False)
    except SystemExit as ended:
        if ended.code:
            raise
    print("commands done:", done)
"""
PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin")
CODE = "modeling_foreign.py"


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    return [_locked(), _licences(), _advisories(), _code_of_ours(), *_commands(work, size)]


def _locked() -> Outcome:
    """Each package of this environment is in the lock, with that version and a hash."""
    outcome = Outcome("supply: locks", "every installed package is a locked one, under a hash")
    installed = {canonicalize_name(package.metadata["Name"]): package.version for package in licences.installed()}
    lines = [locked for path in REQUIREMENTS.glob("*.txt") if path.stem != "excluded" for locked in read(path)]
    outcome.losses = unlocked(installed) + [f"{line.requirement} is locked without a hash" for line in lines if not line.hashes]
    outcome.tried = len(installed) + len(lines)
    outcome.figures = {"packages": len(installed), "locked_lines": len(lines), "hashes": sum(len(line.hashes) for line in lines)}
    return outcome


def unlocked(installed: Mapping[str, str]) -> list[str]:
    """What is installed otherwise than the locks say."""
    locked = {name: {line.version} for name, line in installed_by("test", "torch").items()}
    locked["torch"] |= {line.version for line in installed_by("torch-cpu").values()}
    return [
        f"{name} {version} is installed, and {' or '.join(locked[name]) if name in locked else 'none'} is locked"
        for name, version in installed.items()
        if name not in ("flora-export", "pip") and version not in locked.get(name, ())  # ours; and what the environment came with
    ]


def _licences() -> Outcome:
    found = licences.environment()
    return Outcome(
        "supply: licences",
        "every installed package is in docs/licences.md, and permissive or excepted with a reason",
        len(found),
        licences.losses(found, licences.LIST.read_text()),
    )


def _advisories() -> Outcome:
    sentence = (
        "no service of advisories is asked in a campaign, which runs without a network: `make audit` asks one, where there is a network"
    )
    return Outcome("supply: advisories", "no locked version has a known vulnerability", not_tried=[sentence])


def _code_of_ours() -> Outcome:
    """Each call in the package that could run a model's own code, or a pickle's, says that it does not."""
    outcome = Outcome("supply: our code", "no call trusts a model's own code or a pickle")
    for path in sorted((ROOT / "flora_export").rglob("*.py")):
        calls, losses = careless(path.read_text())
        outcome.tried += calls
        outcome.losses += [f"{path.relative_to(ROOT)}:{loss}" for loss in losses]
    return outcome


def careless(source: str) -> tuple[int, list[str]]:
    """How many calls of a source load something that may hold code, and those that do not refuse it."""
    calls, losses = 0, []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if re.search(r"\bAuto\w+\.from_(pretrained|config)$", called):
            needed: tuple[str, bool] | None = ("trust_remote_code", False)
        elif called == "torch.load":
            needed = ("weights_only", True)
        else:
            needed = None
        harmful = re.fullmatch(r"(pickle|cPickle|dill|joblib|marshal)\.(loads?|Unpickler)", called)
        trusting = needed is None and given.get("trust_remote_code", False) is not False
        if needed or harmful or trusting:
            calls += 1
        if harmful or trusting or (needed and given.get(needed[0]) is not needed[1]):
            losses.append(f"{node.lineno} calls {called} without {f'{needed[0]}={needed[1]}' if needed else 'need'}")
    return calls, losses


def _commands(work: Path, size: Size) -> Iterator[Outcome]:
    network = Outcome("supply: network", "every command works without a network interface, and tries no connection")
    foreign = Outcome("supply: foreign code", "modules and pickles beside a base model or an adapter are neither opened nor run")
    if not shutil.which("strace"):
        network.not_tried = foreign.not_tried = ["no strace here, which sees what a command opens and connects to"]
        yield from (network, foreign)
        return
    from tests.families import make_adapter, make_speaking_base

    base = make_speaking_base(work / "base")
    adapter = make_adapter(base, work / "adapter", alpha=32.0)
    mlp = make_adapter(base, work / "mlp", alpha=32.0, target_modules=["mlp"])
    ran = [file for directory in (adapter, mlp) for file in plant(base, directory)]
    tiny = commands(base, adapter, work / "out")
    trials = [("a tiny model", tiny)] if size == "short" else [(f"a tiny model: {command[0]}", [command]) for command in tiny]
    if size == "full":
        for backend, options in {"openvino": [], "tensorrt": ["--compute-capability", "8.6"], "hf": []}.items():
            made = mlp if backend == "hf" else adapter
            build = ["build", str(made), "--base", str(base), "--backend", backend, "--output", str(work / backend), *options]
            trials.append((f"a tiny model: --backend {backend}", [build]))
        if SMOLLM2.is_dir():
            trials += [(f"SmolLM2: {command[0]}", [command]) for command in commands(SMOLLM2, ADAPTER, work / "smollm2")]
        else:
            network.not_tried.append("models/smollm2 is not there")
    isolated = shutil.which("unshare") and subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode == 0
    if not isolated:
        network.not_tried.append("this machine makes no network namespace: connections are watched, and the network is there")
    for name, arguments in trials:
        code, output, trace = traced(work, arguments, NO_NETWORK if isolated else ())
        network.tried += len(arguments)
        foreign.tried += len(arguments)
        if code != 0 or f"commands done: {len(arguments)}" not in output:
            network.losses.append(f"{name} ends with {code}: {output[-400:]}")
        network.losses += [f"{name}: {line}" for line in connections(trace)]
        foreign.losses += [f"{name}: {line}" for line in trace if opened(line, (CODE, *PICKLES))]
    foreign.losses += [f"{file.name} was written: code or a pickle beside the model ran" for file in ran if file.exists()]
    yield from (network, foreign)


def commands(base: Path, adapter: Path, output: Path) -> list[list[str]]:
    """The command lines of an artifact's life."""
    return [
        ["build", str(adapter), "--base", str(base), "--backend", "onnxruntime", "--output", str(output)],
        ["verify", str(output)],
        ["explain", str(output)],
        ["generate", str(output), "what is the answer", "--max-new-tokens", "4"],
        ["bench", str(output), "--base", str(base), "--arms", "base,fused", "--rounds", "3", "--past-tokens", "8", "--new-tokens", "4"],
        ["triton", str(output), str(output.with_name(output.name + "-repository"))],
    ]


def plant(base: Path, adapter: Path) -> list[Path]:
    """Put code and pickles beside a model: the files that they write when they run."""
    ran = [base.with_name("ran-code"), base.with_name("ran-pickle")]
    (base / CODE).write_text(f"open({str(ran[0])!r}, 'w').close()\nclass Config: ...\nclass Model: ...\nclass Tokenizer: ...\n")
    module = CODE.removesuffix(".py")
    for name, entries in {
        "config.json": {"AutoConfig": f"{module}.Config", "AutoModelForCausalLM": f"{module}.Model"},
        "tokenizer_config.json": {"AutoTokenizer": [f"{module}.Tokenizer", f"{module}.Tokenizer"]},
    }.items():
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(content | {"auto_map": entries}))
    order = f"open({str(ran[1])!r}, 'w').close()"
    pickle = b"cbuiltins\nexec\n(V" + order.encode() + b"\ntR."
    for directory in (base, adapter):
        for name in PICKLES:
            (directory / name).write_bytes(pickle)
    return ran


def traced(work: Path, arguments: Sequence[Sequence[str]], before: Sequence[str], program: str = PROGRAM) -> tuple[int, str, list[str]]:
    """Run command lines in one process of this interpreter: its exit code, what it printed, and its traced system calls."""
    trace = work / "trace"
    command = [*before, *TRACE, f"--output={trace}", sys.executable, "-c", program, json.dumps(arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment, cwd=work)
    return done.returncode, done.stdout + done.stderr, trace.read_text(errors="replace").splitlines()


def connections(trace: Sequence[str]) -> list[str]:
    """The attempts to connect to an internet address, the loopback included."""
    return [line for line in trace if "connect(" in line and re.search(r"sa_family=AF_INET6?\b", line)]


def opened(line: str, names: Sequence[str]) -> bool:
    return ("open(" in line or "openat(" in line) and any(f'/{name}"' in line for name in names)
