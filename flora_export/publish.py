"""publish(): an artifact becomes the live version of a Triton model repository, if what is there computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flora_export.artifact import Artifact, changed_files, open_artifact
from flora_export.backends import PUBLISHED, backend_of
from flora_export.backends.triton.config import DECODER, GENERATE, Serving, parse, read_serving
from flora_export.backends.triton.program.decoding import Logits, Row
from flora_export.backends.triton.program.generation import Model, Settings
from flora_export.backends.triton.repository import live, make_live, staged_version
from flora_export.backends.triton.version import WARMUP
from flora_export.base_model import read_json
from flora_export.errors import ArtifactError, VerificationError
from flora_export.generate import encode, end_tokens
from flora_export.pipeline import BuildOptions, build
from flora_export.refill import refill
from flora_export.scratch import Scratch
from flora_export.trust.signature import Signer, check_signature
from flora_export.verify.golden import allowed_error, recorded_prompts, replay
from flora_export.verify.parity import VerifyOptions
from flora_export.verify.prompts import PROMPTS, load_tokenizer
from flora_export.verify.report import Report

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Published:
    """A version that went live, the one that was live before it, and the models that serve it."""

    version: int
    former: int | None
    models: tuple[str, ...]


def publish_signed(path: Path, signer: Signer, repo: Path, serving: Serving, progress: Progress) -> Published:
    """`publish` of what a signer vouches for: the signature is checked before anything else of the directory is read.

    Raises:
        VerificationError: it is unsigned, or not as it was signed; the repository is as it was.
        FloraExportError: as `check_signature` and `publish`.
    """
    progress("checking the signature", 0, 1)
    check_signature(path, signer)
    return publish(open_artifact(path), repo, serving, progress)


def publish(artifact: Artifact, repo: Path, serving: Serving, progress: Progress, *, after: int | None = None) -> Published:
    """Copy the artifact into the repository as its next version, prove the copy, and make it live.

    Args:
        after: the version that must still be live; None: whichever is.

    Raises:
        ArtifactError: another version went live meanwhile.
        VerificationError: a file is damaged, or the golden vectors do not replay; what was live still is.
        FloraExportError: its other subclasses say what failed.
    """
    progress("writing the version", 0, 1)
    with staged_version(artifact, repo, serving) as staged:
        if after not in (None, staged.former):
            raise ArtifactError(f"{repo}: version {staged.former} went live while this one was made from version {after}. Publish again.")
        progress("checking its files", 0, 1)
        faults = changed_files(staged.artifact)
        if not faults:
            progress("replaying golden vectors", 0, 1)
            faults = replay(staged.artifact, backend_of(artifact).decode(staged.artifact))
        if not faults and GENERATE in staged.models:
            progress("answering golden prompts as `generate` does", 0, 1)
            faults = generation_faults(staged.artifact, serving.max_prompt)
        if faults:
            raise VerificationError("\n  ".join([f"the version does not go live in {repo}:", *faults]), {"causes": faults})
    return Published(staged.version, staged.former, staged.models)


def publish_adapter(repo: Path, name: str, ckpt: Path, base_name: str | None, options: VerifyOptions, progress: Progress) -> Published:
    """Another version of the bank that is live, served as it is, with an adapter by that name: in place of the one it has, or a new one.

    Raises:
        ArtifactError: what is live is no bank with slots, or is not live any more when the new version is ready.
        VerificationError: the adapter is not what eager PyTorch computes; what was live still is.
        FloraExportError: as `refill` and `publish`.
    """
    repo = repo.resolve()
    version = live(repo)[DECODER]
    serving = read_serving(repo)
    with Scratch(f".{repo.name}.artifact-", repo.parent) as scratch:
        artifact, _ = refill(repo / DECODER / str(version), name, ckpt, base_name, Path(scratch) / "out", options, progress, force=False)
        return publish(artifact, repo, serving, progress, after=version)


def build_and_publish(ckpt: Path, base_name: str | None, repo: Path, options: BuildOptions, progress: Progress) -> tuple[Artifact, Report]:
    """`build --backend triton`: an ONNX Runtime artifact, built beside the repository, published in it, and gone again.

    A repository that is there goes on being served as it is.

    Returns the artifact as it lies in the repository, and its report.

    Raises:
        ArtifactError: there is a repository already and `options.force` is not given, or the build is not to be verified.
        FloraExportError: as `build` and `publish`.
    """
    repo = repo.resolve()
    if repo.exists() and not options.force:
        raise ArtifactError(f"{repo} exists already. Pass --force to publish a new version there, beside those that it has.")
    if not options.verify:
        raise ArtifactError("--no-verify records no golden vectors, and without them no version goes live. Build and verify, then publish.")
    parse("")  # what publishing needs is asked for before the work
    repo.parent.mkdir(parents=True, exist_ok=True)
    with Scratch(f".{repo.name}.artifact-", repo.parent) as scratch:
        artifact, report = build(
            ckpt, base_name, Path(scratch) / "out", replace(options, backend=PUBLISHED[options.backend], force=False), progress
        )
        published = publish(artifact, repo, read_serving(repo), progress)
    return open_artifact(repo / "decoder" / str(published.version)), report


def roll_back(repo: Path, to: int | None) -> Published:
    """Make an earlier version live again: `to`, or the one that was live when the live one was published.

    Raises:
        ArtifactError: there is no such version, or its files are damaged.
    """
    version, former = make_live(repo, to)
    return Published(version, former, tuple(live(repo)))


def generation_faults(artifact: Artifact, most_prompt: int = 0) -> list[str]:
    """Whether the artifact answers golden prompts as `generate` runs it, all of them together, and ends its answers where it should."""
    try:
        encode(load_tokenizer(artifact.path), PROMPTS, chat=True)  # a template that does not end must not go live
        served = Model(artifact.path)
        first = len(served.encode(WARMUP, None, Settings()))
    except Exception as error:  # ONNX Runtime and transformers have no types of their own for what they refuse
        return [f"the model and the tokenizer do not load for `generate`: {error}"]
    if 0 < most_prompt < first:
        return [f"--max-prompt is {most_prompt}, but the first request, by which the server tries `generate`, has {first} tokens"]
    ends = end_tokens(artifact, read_json(artifact.path / "config.json", "model configuration"))
    if served.ends != ends:
        return [f"`generate` would end answers at {sorted(served.ends)}, but the artifact ends them at {sorted(ends)}"]
    prompts = recorded_prompts(artifact)
    try:
        answers = _greedy(served, [Row(prompt.ids.tolist(), len(prompt.tokens), prompt.slot) for prompt in prompts])
    except Exception as error:
        return [f"`generate` cannot answer the golden prompts: {error}"]
    faults = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens, logits = prompt.tokens, prompt.logits
        differ = [step for step, token in enumerate(answer) if token != tokens[step]]
        if differ:  # two tokens so close that rounding decides are both right; what follows is then another answer
            step = differ[0]
            margin = float(logits[step, tokens[step]] - logits[step, answer[step]])
            if not margin <= allowed_error(artifact, logits):
                faults.append(f"`generate` answers golden prompt {index} with token {answer[step]} at step {step}, not {tokens[step]}")
    return faults


def _greedy(served: Model, rows: list[Row]) -> list[list[int]]:
    """The most likely tokens of each row, up to an end token."""
    decoder, answers = served.decoder, {row: list[int]() for row in rows}

    def take(row: Row, logits: Logits) -> bool:
        row.token = int(logits.argmax())
        answers[row].append(row.token)
        return len(answers[row]) == row.most - len(row.prompt) or row.token in served.ends

    for row in rows:
        while (logits := decoder.read(row)) is None:
            pass
        if not take(row, logits):
            decoder.join(row)
    while decoder.rows:
        for row, logits in decoder.step():
            if take(row, logits):
                decoder.leave(row)
    return list(answers.values())
