"""Adapters replaced while a bank serves: exact, reversible, whole for every request, and rejected whole where they are wrong."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flora_export.artifact import PROVENANCE, Artifact, open_artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.bank import COLUMNS, STACK
from flora_export.errors import ArtifactError, BackendError, CheckpointError, FloraExportError, VerificationError
from flora_export.manifest import Manifest
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.refill import refill
from flora_export.runtime import Session
from tests.banks import NAMES, PROMPTS, fill, logits, make_bank, scaled
from tests.conftest import silent
from tests.families import make_adapter, make_lora

Adapters = dict[str, Path]


@pytest.fixture(scope="module")
def served(adapters: Adapters, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two adapters and a free slot; the third waits."""
    two = {name: adapters[name] for name in NAMES[:2]}
    return make_bank(two, base, tmp_path_factory.mktemp("served") / "out", STACK, slots=3)


def answers(session: Session, *names: str) -> list[np.ndarray]:
    with session.request(list(names)) as decoder:
        return logits(decoder, PROMPTS[: len(names)], None)


@pytest.fixture(scope="module")
def alone(adapters: Adapters, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[np.ndarray]]:
    """What an adapter answers in a bank that was built with it by itself."""
    root, made = tmp_path_factory.mktemp("alone"), {}

    def get(name: str) -> list[np.ndarray]:
        if name not in made:
            out = make_bank({name: adapters[name]}, base, root / name, STACK, slots=3, verify=False)
            made[name] = logits(Decoder(out), PROMPTS[:2], 0)
        return made[name]

    return get


def test_a_swap_is_exact_and_reversible(served: Artifact, adapters: Adapters, alone: Callable[[str], list[np.ndarray]]) -> None:
    session = Session(served.path)
    first, second, base = answers(session, "first", "first"), answers(session, "second", "second"), answers(session, "base", "base")
    for name in ("third", "first", "second", "first"):
        session.swap("first", adapters[name])
        for got, own in zip(answers(session, "first", "first"), alone(name), strict=True):
            np.testing.assert_allclose(got, own, atol=2e-5)  # a smaller rank has fewer zeros beside it
        for before, name_ in ((second, "second"), (base, "base")):
            for was, now in zip(before, answers(session, name_, name_), strict=True):
                assert np.array_equal(was, now)
    for was, now in zip(first, answers(session, "first", "first"), strict=True):
        assert np.array_equal(was, now)
    assert np.abs(first[0] - alone("third")[0]).max() > 1e-2


def test_a_new_name_takes_an_empty_slot(served: Artifact, adapters: Adapters, alone: Callable[[str], list[np.ndarray]]) -> None:
    session = Session(served.path)
    assert session.names == ("first", "second")
    with pytest.raises(FloraExportError, match="no adapter 'third'; there are first, second, base"), session.request(["third"]):
        pass
    session.swap("third", adapters["third"])
    assert session.names == NAMES
    np.testing.assert_allclose(answers(session, "third", "base")[0], alone("third")[0], atol=2e-5)
    with pytest.raises(FloraExportError, match="all 3 slots are taken: swap one of first, second, third"):
        session.swap("fourth", adapters["third"])


def test_what_is_wrong_is_rejected_whole(served: Artifact, adapters: Adapters, base: Path, tmp_path: Path) -> None:
    session = Session(served.path)
    before = answers(session, "first", "second")
    damaged = Path(shutil.copytree(adapters["third"], tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes((damaged / "adapter_model.safetensors").read_bytes()[:-8])
    wrong = {
        "damaged": (damaged, CheckpointError, "not a whole safetensors file"),
        "nan": (scaled(adapters["first"], tmp_path / "nan", np.nan), CheckpointError, "finite|NaN|nan"),
        "rank": (make_adapter(base, tmp_path / "rank", r=7), CheckpointError, "has rank 7, and the bank room for 6"),
        "relu": (
            make_adapter(base, tmp_path / "relu", mlp_activation="relu"),
            CheckpointError,
            "the activation relu, in the bank it is gated",
        ),
        "lora": (make_lora(base, tmp_path / "lora"), CheckpointError, "is LORA, and the adapters of .* are FFBA"),
        "nothing": (tmp_path / "nothing", CheckpointError, "adapter_config.json is missing"),
    }
    for path, error, message in wrong.values():
        with pytest.raises(error, match=message):
            session.swap("first", path)
    with pytest.raises(FloraExportError, match="cannot be an adapter's name"):
        session.swap("base", adapters["third"])
    for was, now in zip(before, answers(session, "first", "second"), strict=True):
        assert np.array_equal(was, now)


def test_golden_vectors_are_replayed_before_anyone_is_served(served: Artifact, adapters: Adapters, base: Path, tmp_path: Path) -> None:
    session = Session(served.path)
    build(adapters["third"], str(base), tmp_path / "third", BuildOptions(), silent)
    session.swap("first", adapters["third"], golden=tmp_path / "third")
    before = answers(session, "first", "second")
    other = scaled(adapters["third"], tmp_path / "other", 1.5)
    with pytest.raises(VerificationError, match="does not answer as was recorded: golden prompt 0"):
        session.swap("first", other, golden=tmp_path / "third")
    with pytest.raises(ArtifactError, match="no golden vectors of an adapter 'third'"):
        session.swap("third", adapters["third"], golden=served.path)
    for was, now in zip(before, answers(session, "first", "second"), strict=True):
        assert np.array_equal(was, now)


@pytest.mark.parametrize("slots", [2, 3], ids=["no slot is free", "one slot is free"])
def test_every_request_under_load_sees_one_adapter_whole(slots: int, adapters: Adapters, base: Path, tmp_path: Path) -> None:
    """Swaps back and forth under the requests of four threads: each answer is wholly that of one of the two, and none fails."""
    two = {name: adapters[name] for name in NAMES[:2]}
    session = Session(make_bank(two, base, tmp_path / "out", STACK, slots=slots, verify=False).path, threads=1)
    session.swap("second", adapters["third"])
    right = [answers(session, "second", "base")]
    session.swap("second", adapters["second"])
    right.append(answers(session, "second", "base"))
    steady = answers(session, "first", "first")[0]
    seen, wrong, stop = [0, 0], [], threading.Event()

    def serve(name: str) -> None:
        try:
            while not stop.is_set():
                got = answers(session, name, "base")
                if name == "first":
                    if not np.allclose(got[0], steady, atol=1e-5):
                        wrong.append("first has changed")
                    continue
                matches = [index for index, each in enumerate(right) if np.array_equal(got[0], each[0])]
                if len(matches) != 1 or not np.array_equal(got[1], right[0][1]):
                    wrong.append(f"a mixed answer: {matches}")
                else:
                    seen[matches[0]] += 1
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("second", "second", "second", "first")]
    for thread in threads:
        thread.start()
    for swap in range(40):
        session.swap("second", adapters["third" if swap % 2 == 0 else "second"], timeout=60)
        time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert min(seen) > 0, seen


def test_a_swap_waits_for_requests_where_no_slot_is_free(adapters: Adapters, base: Path, tmp_path: Path) -> None:
    two = {name: adapters[name] for name in NAMES[:2]}
    session = Session(make_bank(two, base, tmp_path / "out", STACK, verify=False).path)
    with session.request(["first"]) as decoder:
        before = logits(decoder, PROMPTS[:1], None)[0]
        with pytest.raises(FloraExportError, match="have not ended in time"):
            session.swap("first", adapters["third"], timeout=0.05)
        session.swap("second", adapters["third"])  # no one uses that
        assert np.array_equal(logits(decoder, PROMPTS[:1], None)[0], before)
    session.swap("first", adapters["third"], timeout=5)
    with session.request(["first"]):
        waiting = threading.Thread(target=lambda: session.swap("first", adapters["first"], timeout=60))
        waiting.start()
        while session._closed_for is None:
            time.sleep(0.01)
        with pytest.raises(FloraExportError, match="another swap has not ended"):
            session.swap("second", adapters["third"], timeout=0.05)
        assert len(answers(session, "second", "base")) == 2  # who asks another adapter does not wait
        again = session.request(["first"], timeout=0)  # a thread that must not wait for itself
        with pytest.raises(FloraExportError, match="'first' is being replaced, and was not within 0 seconds"):
            again.__enter__()
    waiting.join()
    session.swap("first", adapters["third"], timeout=5)
    with session.request(["first"]) as decoder:
        assert not np.array_equal(logits(decoder, PROMPTS[:1], None)[0], before)


def test_a_session_is_for_banks_with_slots(adapters: Adapters, base: Path, tmp_path: Path) -> None:
    out = make_bank(adapters, base, tmp_path / "out", COLUMNS, verify=False)
    with pytest.raises(ArtifactError, match="has no slots to be filled"):
        Session(out.path)
    stack = make_bank(adapters, base, tmp_path / "stack", STACK, verify=False)
    fill(stack.path, lambda entry: True, 1.0)
    with pytest.raises(ArtifactError, match="SHA-256"):
        Session(stack.path)
    cuda = make_bank(adapters, base, tmp_path / "cuda", STACK, verify=False, target="cuda", precision="fp16")
    with pytest.raises(BackendError, match="on the CPU"):
        Session(cuda.path)


def test_beside_quantized_weights_as_well(adapters: Adapters, base: Path, tmp_path: Path) -> None:
    two = {name: adapters[name] for name in NAMES[:2]}
    session = Session(make_bank(two, base, tmp_path / "out", STACK, precision="int4", verify=False).path)
    other = Session(make_bank(two | {"second": adapters["third"]}, base, tmp_path / "other", STACK, precision="int4", verify=False).path)
    before, wanted = answers(session, "second", "first"), answers(other, "second", "first")
    session.swap("second", adapters["third"])
    np.testing.assert_allclose(answers(session, "second", "first")[0], wanted[0], atol=2e-3)
    assert np.abs(before[0] - wanted[0]).max() > 1e-2


def test_a_runtime_that_copies_the_adapters_is_noticed(adapters: Adapters, base: Path, tmp_path: Path) -> None:
    """On a CPU ONNX Runtime casts fp16 weights once, when they are loaded: what is written afterwards would be lost in silence."""
    out = make_bank({"first": adapters["first"]}, base, tmp_path / "out", STACK, precision="fp16", verify=False)
    with pytest.raises(BackendError, match="keeps a copy of the adapters"):
        Session(out.path)


def without_provenance(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, files={name: known for name, known in manifest.files.items() if name != PROVENANCE})


def test_an_artifact_is_refilled(served: Artifact, adapters: Adapters, base: Path, tmp_path: Path) -> None:
    """A third adapter into the empty slot, then another in its place: each is what a build from the same adapters is, byte for byte.

    But for the provenance: no build has made it.
    """
    out, before = tmp_path / "out", open_artifact(served.path)
    artifact, report = refill(served.path, "third", adapters["third"], str(base), out, VerifyOptions(), silent, force=False)
    assert report.verified and artifact.manifest.bank is not None and artifact.manifest.bank.names == NAMES
    built = make_bank(adapters, base, tmp_path / "built", STACK, slots=3)
    assert PROVENANCE not in artifact.manifest.files and PROVENANCE not in {file.name for file in out.iterdir()}
    assert open_artifact(out).manifest == without_provenance(open_artifact(built.path).manifest)
    paths = [adapters[name] for name in NAMES]
    assert verify(out, paths[0], str(base), VerifyOptions(others=tuple(paths[1:])), silent).verified
    refill(out, "first", adapters["second"], str(base), out, VerifyOptions(), silent, force=True)
    other = make_bank({**adapters, "first": adapters["second"]}, base, tmp_path / "other", STACK, slots=3)
    assert open_artifact(out).manifest == without_provenance(other.manifest)
    refill(out, "first", adapters["first"], str(base), out, VerifyOptions(), silent, force=True)
    assert open_artifact(out).manifest == without_provenance(built.manifest)
    refill(out, "second", adapters["third"], str(base), out, VerifyOptions(), silent, force=True)
    assert verify(out, paths[0], str(base), VerifyOptions(others=(paths[2], paths[2])), silent).verified
    assert open_artifact(served.path) == before and verify(served.path, None, None, VerifyOptions(), silent).verified


def test_a_refill_that_cannot_be_leaves_all_as_it_was(
    served: Artifact, adapters: Adapters, base: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    def attempt(name: str, ckpt: Path, own: Path = base) -> None:
        refill(served.path, name, ckpt, str(own), served.path, VerifyOptions(), silent, force=True)

    before = {file.name: file.read_bytes() for file in served.path.iterdir()}
    with pytest.raises(VerificationError, match="vacuous"):
        attempt("first", scaled(adapters["first"], tmp_path / "zero", 0.0))
    with pytest.raises(CheckpointError, match="room for 6"):
        attempt("third", make_adapter(base, tmp_path / "rank", r=9))
    with pytest.raises(ArtifactError, match="is not the base model"):
        attempt("third", adapters["third"], bases("llama_tied"))
    huge = scaled(adapters["third"], tmp_path / "huge", 1.0)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file(tensors | {"more": np.zeros(1, np.float32)}, huge / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="more"):
        attempt("third", huge)
    assert {file.name: file.read_bytes() for file in served.path.iterdir()} == before


def test_two_refills_at_once_do_not_lose_one(served: Artifact, adapters: Adapters, base: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(served.path, tmp_path / "out"))

    def meanwhile(what: str, done: int, of: int) -> None:
        if what == "replaying the other adapters":
            refill(served.path, "second", adapters["third"], str(base), out, VerifyOptions(), silent, force=True)

    with pytest.raises(ArtifactError, match="has changed while 'first' was put into it"):
        refill(out, "first", adapters["third"], str(base), out, VerifyOptions(), meanwhile, force=True)
    bank = open_artifact(out).manifest.bank
    assert bank is not None and bank.digests[0] != bank.digests[1]
    with ThreadPoolExecutor(2) as pool:  # one waits for the other
        for name in ("first", "second"):
            pool.submit(refill, out, name, adapters["first"], str(base), out, VerifyOptions(), silent, force=True)
    bank = open_artifact(out).manifest.bank
    assert bank is not None and bank.digests[0] == bank.digests[1] != ""
    bare = make_bank({"first": adapters["first"]}, base, tmp_path / "bare", STACK, slots=2, verify=False)
    with pytest.raises(ArtifactError, match="was built with --no-verify"):
        refill(bare.path, "second", adapters["third"], str(base), bare.path, VerifyOptions(), silent, force=True)
