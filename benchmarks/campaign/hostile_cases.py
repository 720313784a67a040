"""Directories that were made to do harm: path traversal, links, bombs, programs in templates; and what the short form takes of them."""

from __future__ import annotations

from benchmarks.campaign import hostile_artifacts, hostile_sources
from benchmarks.campaign.hostile_directory import Case

# One of each kind, for the short form.
SHORT = (
    "adapter r=10^12", "adapter config: 100,000 levels", "weights: a header of 2^63", "weights: a FIFO", "base index: ../secret",
    "manifest files: ../secret", "onnx location: /etc/passwd", "tokenizer: 100,000 levels: generate", "template: endless: generate",
    "template: classes: generate", "pickle: runs code: convert",
)  # fmt: skip


def cases() -> list[Case]:
    listed = [*hostile_sources.cases(), *hostile_artifacts.cases()]
    assert len({case.name for case in listed}) == len(listed)
    return listed
