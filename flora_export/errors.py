"""Every error this package raises on purpose. A message says what, where, expected and got, and the remedy."""

from __future__ import annotations


class FloraExportError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 2


class CheckpointError(FloraExportError):
    """The adapter checkpoint, or the base model it names, is wrong, incomplete or unreadable."""


class FusionError(FloraExportError):
    """A branch cannot be attached or fused without changing what the model computes."""


class ArtifactError(FloraExportError):
    """An output directory is missing, incomplete, or already there."""


class BackendError(FloraExportError):
    """A backend, or a tool that it needs, is missing or failed."""

    exit_code = 3


class VerificationError(FloraExportError):
    """The artifact does not hold what it should, or does not compute what it should. `report` is the report as a JSON object."""

    exit_code = 1

    def __init__(self, message: str, report: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.report = report
