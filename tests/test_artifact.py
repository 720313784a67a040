"""OUT/ appears whole or not at all: refused where it exists, untouched by a failure, a full disk or a SIGKILL."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flora_export.artifact import MANIFEST, open_artifact, staged, writing
from flora_export.errors import ArtifactError, BackendError, CheckpointError, FloraExportError
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import make_adapter


def listing(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    build(adapter, str(base), out, BuildOptions(verify=False), silent)
    return out


def test_existing_output(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    before = listing(out)
    with pytest.raises(ArtifactError, match=r"exists already.*--force"):
        build(adapter, str(base), out, BuildOptions(verify=False), silent)
    assert listing(out) == before
    (out / "left over").touch()
    build(adapter, str(base), out, BuildOptions(verify=False, force=True), silent)
    assert listing(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_artifacts_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match="is not an artifact"), staged(tmp_path / "precious", force=True):
        pass
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_failed_build_leaves_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FloraExportError):
        build(adapter, str(base), tmp_path / "out", BuildOptions(precision="bf16"), silent)
    assert list(tmp_path.iterdir()) == []


def test_two_builds_are_byte_identical(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    """In another process, with other hash seeds, from copies in other places."""
    other_base, other_adapter = shutil.copytree(base, tmp_path / "b"), shutil.copytree(adapter, tmp_path / "a")
    command = [sys.executable, "-m", "flora_export.cli", "build", str(other_adapter), "--base", str(other_base), "--backend", "onnxruntime"]
    command += ["--no-verify", "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert listing(tmp_path / "out") == listing(built)


KILL = """
import os, signal, sys
from pathlib import Path
from flora_export import pipeline
def progress(what, done, of):
    if (what, str(done)) == (sys.argv[4], sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
pipeline.build(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), pipeline.BuildOptions(force=True), progress)
"""


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("reading the checkpoint", 0),
        ("capturing the base model", 0),
        ("writing", 7),
        ("comparing with PyTorch", 3),
        ("checking the ledger", 0),
    ],
)
def test_sigkill(built: Path, base: Path, adapter: Path, tmp_path: Path, stage: str, done: int, existing: bool) -> None:
    """Killed at any point, the output is absent or the former one, and the next build sweeps up."""
    out = tmp_path / "out"
    if existing:
        shutil.copytree(built, out)
    result = subprocess.run(
        [sys.executable, "-c", KILL, adapter, base, out, stage, str(done)], capture_output=True, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL
    assert (listing(out) == listing(built)) if existing else not out.exists()
    assert len(list(tmp_path.glob(".out.building-*"))) == 1
    build(adapter, str(base), out, BuildOptions(verify=False, force=True), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_running_build_is_not_swept(tmp_path: Path) -> None:
    with staged(tmp_path / "out", force=False) as first:
        (first / MANIFEST).touch()
        with staged(tmp_path / "out", force=False) as second:
            assert first.exists()
            assert first != second
            (second / MANIFEST).touch()
        shutil.rmtree(tmp_path / "out")


def test_full_disk(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(BackendError, match=r"could not be written.*make room"):
            build(adapter, str(base), disk / "out", BuildOptions(verify=False), silent)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_without_root(tmp_path: Path) -> None:
    """The same error as it would come from the kernel."""
    with pytest.raises(BackendError, match="No space left"), staged(tmp_path / "out", force=False), writing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged(tmp_path / "out", force=False):
        raise PermissionError(errno.EACCES, "a base model that may not be read")


@pytest.mark.parametrize("force", [False, True])
def test_what_comes_to_be_there_meanwhile_is_kept(tmp_path: Path, force: bool) -> None:
    def build_while_another_writes() -> None:
        with staged(tmp_path / "out", force=force) as directory:
            (directory / MANIFEST).touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").touch()

    with pytest.raises(ArtifactError, match="exists"):
        build_while_another_writes()
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is a symbolic link"), staged(tmp_path / "link", force=True):
        pass


@pytest.mark.parametrize("atomic", [True, False])
def test_a_former_artifact_trades_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    """In one step where the system can, so that no moment is without an artifact."""
    if not atomic:
        monkeypatch.setattr("flora_export.artifact._exchange", lambda *_: False)
    for text in ("first", "second"):
        with staged(tmp_path / "out[1]", force=True) as directory:
            (directory / MANIFEST).write_text(text)
        assert (tmp_path / "out[1]" / MANIFEST).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written there"), staged(tmp_path / "file" / "out", force=False):
        pass


def test_opening(built: Path, tmp_path: Path) -> None:
    artifact = open_artifact(built)
    assert artifact.manifest.padding == "right"
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json"} <= artifact.manifest.files.keys()
    with pytest.raises(ArtifactError, match="is no artifact"):
        open_artifact(tmp_path)
    text = (built / MANIFEST).read_text()
    for old, new, message in (
        ('"schema_version": 1', '"schema_version": 2', "schema version 2"),
        ('"generation_config.json":', '"../generation_config.json":', "leaves the artifact's directory"),
        ('"ledger": [', '"ledgers": [', "not a manifest"),
        ("{", "", "not a manifest"),
        ('"target": "cpu"', '"target": "tpu"', "target is 'tpu'"),
        ('"axis": 1', '"axis": "one"', "LedgerEntry.axis is 'one'"),
        ('"blocks": [', '"blocks": [], "other": [', "not a manifest"),
    ):
        assert old in text, old
        (tmp_path / MANIFEST).write_text(text.replace(old, new, 1))
        with pytest.raises(ArtifactError, match=message):
            open_artifact(tmp_path)
    for key in ("files", "ledger", "blocks", "outputs", "operators"):
        content = json.loads(text)
        content[key] = type(content[key])()
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match="it is incomplete"):
            open_artifact(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_that_changes_while_it_is_built_is_refused(verify: bool, base: Path, adapter: Path, tmp_path: Path) -> None:
    """What is written and what it is compared with would both be of the new file, and the manifest's SHA-256 of the old."""
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))

    def train(what: str, *_: int) -> None:
        if what == "fusing":
            weights = {name: 1.5 * tensor for name, tensor in load_file(copy / "adapter_model.safetensors").items()}
            save_file(weights, copy / "adapter_model.safetensors")

    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed while it was built from"):
        build(copy, str(base), tmp_path / "out", BuildOptions(verify=verify), train)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_model_that_may_not_be_written_to(tiny_smollm2: Path, tmp_path: Path) -> None:
    """Of what is copied from it nothing keeps its permissions, or nobody but root could go on with it."""
    copy = Path(shutil.copytree(tiny_smollm2, tmp_path / "base"))
    for file in copy.iterdir():
        file.chmod(0o400)
    adapter = make_adapter(copy, tmp_path / "adapter")
    artifact, _ = build(adapter, str(copy), tmp_path / "out", BuildOptions(verify=False), silent)
    assert all(file.stat().st_mode & 0o200 for file in artifact.path.iterdir())
