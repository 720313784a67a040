"""bom.cdx.json: what an artifact is made of, as a CycloneDX ML-BOM: the models with the hash of each file, and the libraries.

It holds no time, and its serial number is made of the manifest's SHA-256: of one artifact there is one text.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_export.artifact import BOM, MANIFEST, SIGNATURE, Artifact, changed_files
from flora_export.base_model import BaseModel, file_sha256
from flora_export.errors import ArtifactError, BackendError, VerificationError
from flora_export.scratch import Scratch
from flora_export.trust.statement import adapter_files, check_adapters, check_base

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

CARD = "README.md"
MAX_CARD_BYTES = 64 * 2**10  # of a model card: its first lines say the licence
LICENCE = re.compile(r"""^license(?:_name)?:[ \t]*["']?([A-Za-z0-9][A-Za-z0-9.+ -]{0,99}?)["']?[ \t]*$""", re.M)


def write_bom(artifact: Artifact, base: BaseModel | None, adapters: Sequence[Path]) -> Path:
    """Write `bom.cdx.json` into an artifact. Licences are those that the cards of `base` and `adapters` state, where these are given.

    Raises:
        ArtifactError: it is signed already, base or adapters are others than it was built from, or the file cannot be written.
        VerificationError: a file is not the manifest's.
        BackendError: cyclonedx-python-lib is missing.
    """
    if (artifact.path / SIGNATURE).exists():
        raise ArtifactError(f"{artifact.path} is signed, and one more file would break that: remove {SIGNATURE}, then `bom`, then `sign`")
    if faults := changed_files(artifact):
        raise VerificationError("\n  ".join([f"{artifact.path} gets no {BOM}:", *faults]), {"causes": faults})
    if base is not None:
        check_base(artifact, base)
    if adapters:
        check_adapters(artifact, adapters)
    stated = None if base is None else licence((base.original or base).path, base.config)
    text = bom(artifact, stated, [licence(path, {}) for path in adapters])
    home = artifact.path.resolve()
    try:
        with Scratch(f".{home.name}.bom-", home.parent) as scratch:  # in one step, and in the place of a link, not of what it leads to
            (Path(scratch) / BOM).write_text(text, encoding="utf-8")
            os.replace(Path(scratch) / BOM, home / BOM)
    except OSError as error:
        raise ArtifactError(f"{artifact.path / BOM}: cannot be written ({error.strerror})") from error
    return artifact.path / BOM


def licence(path: Path, config: Mapping[str, Any]) -> str | None:
    """The licence that a model's card states in its first lines, or else its configuration: an SPDX identifier, or a name."""
    card = path / CARD
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as stream:
            head = re.match(r"---\n(.*?)\n---", stream.read(MAX_CARD_BYTES), re.S)
        if head and (names := LICENCE.findall(head[1])):
            return next((name for name in names if name != "other"), "other")  # then `license_name` says which
    stated = config.get("license")
    return stated[:100] if isinstance(stated, str) and stated.strip() else None


def bom(artifact: Artifact, base_licence: str | None, adapter_licences: Sequence[str | None]) -> str:
    """The text. Raises BackendError: cyclonedx-python-lib is missing."""
    try:
        from cyclonedx.contrib.license.factories import LicenseFactory
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.model.license import LicenseAcknowledgement
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
        from packageurl import PackageURL
    except ImportError as error:
        raise BackendError(f"an ML-BOM needs a package that is not installed ({error}): pip install 'flora-export[trust]'") from error

    def model(ref: str, name: str, files: Mapping[str, str], licences: Sequence[str | None], facts: Mapping[str, Any]) -> Component:
        return Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=ref,
            name=name,
            licenses=[
                LicenseFactory().make_from_string(each, license_acknowledgement=LicenseAcknowledgement.DECLARED)
                for each in sorted({each for each in licences if each})
            ],
            properties=[Property(name=f"flora-export:{key}", value=str(value)) for key, value in facts.items()],
            components=[
                Component(
                    type=ComponentType.FILE,
                    bom_ref=f"{ref}/{file}",
                    name=file,
                    hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha)],
                )
                for file, sha in files.items()
            ],
        )

    manifest, sha = artifact.manifest, file_sha256(artifact.path / MANIFEST)
    facts = {key: getattr(manifest, key) for key in ("backend", "target", "precision", "fuse", "verified")}
    config = manifest.checkpoint["config"]
    name = Path(manifest.base["name"]).name or "base"
    base = model("base", name, manifest.base["files"], [base_licence], {})
    method = str(config.get("peft_type"))
    adapter = model("adapter", f"{method} adapter", adapter_files(manifest), adapter_licences, {"digest": manifest.checkpoint["digest"]})
    files = {MANIFEST: sha} | {file: known["sha256"] for file, known in manifest.files.items()}
    whole = model("artifact", f"{name} with {method} for {manifest.backend}", files, [], facts)
    libraries = [
        Component(
            type=ComponentType.LIBRARY,
            bom_ref=f"library/{package}",
            name=package,
            version=version,
            purl=PackageURL("pypi", name=package, version=version) if package != "flora-export" else None,
        )
        for package, version in manifest.versions.items()
    ]
    made = Bom(components=[base, adapter, *libraries], serial_number=uuid.uuid5(uuid.NAMESPACE_OID, sha))
    made.metadata.component, made.metadata.timestamp = whole, None  # type: ignore[assignment]  # optional in the format
    made.register_dependency(whole, [base, adapter, *libraries])
    made.register_dependency(adapter, [base])
    text: str = make_outputter(made, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    return text + "\n"
