"""model.sig: who vouches for an artifact, as OpenSSF's model-signing writes it: a sigstore bundle over the SHA-256 of every other file.

Key and certificates are the user's own; no service is asked.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_export.artifact import SIGNATURE, changed_files, files_in, open_artifact
from flora_export.base_model import read_json
from flora_export.errors import ArtifactError, BackendError, CheckpointError, FloraExportError, VerificationError
from flora_export.scratch import Scratch

if TYPE_CHECKING:
    from types import ModuleType

CURVES = "a PEM file of an EC key on P-256, P-384 or P-521"
RESOURCES = "https://model_signing/signature/v1.0"  # the predicate that names every file


@dataclass(frozen=True)
class Key:
    """What to sign with: a private key, and of a certificate's key the certificate and those between it and its root."""

    private: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Signer:
    """Whose signature is asked for: that of a public key, or of a certificate that one of these authorities has issued."""

    key: Path | None = None
    authorities: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return str(self.key) if self.key is not None else ", ".join(map(str, self.authorities))


def sign(path: Path, key: Key) -> None:
    """Sign every file of an artifact, and write `model.sig` beside them in one step; one that is there is replaced.

    Raises:
        VerificationError: a file is not the manifest's; what is damaged is not signed.
        ArtifactError: there is no artifact, or it has a link or a special file, or its directory cannot be written.
        FloraExportError: as `signing_with`.
    """
    config = signing_with(key)
    if faults := changed_files(open_artifact(path)):
        raise VerificationError("\n  ".join([f"{path} is not signed:", *faults]), {"causes": faults})
    try:
        home = path.resolve()  # which may be on another disk than a link to it
        with Scratch(f".{home.name}.signing-", home.parent) as scratch:
            write_signature(path, config, Path(scratch) / SIGNATURE)
            os.replace(Path(scratch) / SIGNATURE, home / SIGNATURE)
    except OSError as error:
        raise ArtifactError(f"{path / SIGNATURE}: cannot be written ({error.strerror}); what was there is as it was") from error


def signing_with(key: Key) -> Any:
    """model-signing's configuration for a key. Raises FloraExportError: a file is no key or certificate; BackendError: it is missing."""
    signing = _package().signing
    try:
        if key.certificate is None:
            return signing.Config().use_elliptic_key_signer(private_key=key.private)
        return signing.Config().use_certificate_signer(
            private_key=key.private, signing_certificate=key.certificate, certificate_chain=key.chain
        )
    except Exception as error:  # each kind of wrong file has its own, from `cryptography` and from the system
        given = ", ".join(map(str, filter(None, (key.private, key.certificate, *key.chain))))
        raise FloraExportError(
            f"{given}: cannot sign ({_reason(error)}); expected {CURVES}, private and not encrypted, and certificates of it in PEM"
        ) from error


def write_signature(path: Path, config: Any, file: Path) -> None:
    """Sign a directory into a file. Raises ArtifactError: it has a link, or what is neither file nor directory."""
    try:
        config.set_hashing_config(_hashing()).sign(path.resolve(), file)  # OUT itself may be a link; nothing in it may
    except ValueError as error:
        raise ArtifactError(f"{path}: cannot be signed ({_reason(error)})") from error


def verifying_with(signer: Signer) -> Any:
    """The same for a signer. Raises FloraExportError where a file is no key or certificate, BackendError without model-signing."""
    verifying = _package().verifying
    try:
        if signer.key is not None:
            return verifying.Config().use_elliptic_key_verifier(public_key=signer.key)
        return verifying.Config().use_certificate_verifier(certificate_chain=signer.authorities)
    except Exception as error:  # as above
        expected = f"{CURVES}, public" if signer.key is not None else "certificates in PEM"
        raise FloraExportError(f"{signer}: no signature can be checked with it ({_reason(error)}); expected {expected}") from error


def check_signature(path: Path, signer: Signer) -> None:
    """Return where every file of a directory is as that signer has signed it, and there is no other.

    Raises:
        VerificationError: it is unsigned, signed by somebody else, or something was changed, added or removed.
        FloraExportError: as `verifying_with`.
    """
    config = verifying_with(signer)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    if not (path / SIGNATURE).is_file():
        raise VerificationError(f"{path} is not signed: it has no {SIGNATURE}, but the signature of {signer} is asked for")
    try:
        bundle = read_json(path / SIGNATURE, "signature")
        if unsigned := files_in(path) - {SIGNATURE} - _covered(bundle):  # before they are read; it may say that they do not count
            raise ValueError(f"not covered by it: {', '.join(sorted(unsigned))}")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints warnings there
            config.set_hashing_config(_hashing()).verify(path.resolve(), path.resolve() / SIGNATURE)
    except (OSError, MemoryError):
        raise  # the machine's
    except Exception as error:  # a stranger wrote the file, and its readers have an error for each way to be wrong
        raise VerificationError(
            f"{path}: {SIGNATURE} is not the signature of {signer} on these files ({_reason(error)}). Do not use them; fetch them again."
        ) from error


def _covered(bundle: dict[str, Any]) -> set[str]:
    """The files that a signature names."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    if statement["predicateType"] != RESOURCES:
        raise ValueError(f"it is a {statement['predicateType']!r:.100}, not a {RESOURCES}")
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def _hashing() -> Any:
    """Every file counts but the signature itself: those of git as well, which are left out by default."""
    return _package().hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _package() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise BackendError(f"signatures need a package that is not installed ({error}): pip install 'flora-export[trust]'") from error
    return model_signing


def _reason(error: Exception) -> str:
    """One line of what a library says, or of what kind its error is."""
    if isinstance(error, CheckpointError):
        return "its signature cannot be read"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    text = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
    # Of a digest that differs it gives the raw bytes, quoted as they need it: its file is enough.
    differing = re.findall(r"Hash mismatch for '(.+?)': Expected", text.replace("\\'", "'"))
    return f"hash mismatch for {', '.join(map(repr, differing))}"[:600] if differing else text[:600].removesuffix(":")
