"""The lock files of requirements/, read: which version of which package, for which machine, and under which hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


@dataclass(frozen=True)
class Locked:
    name: str
    version: str
    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def here(self) -> bool:
        """Whether this machine and this Python install it."""
        return self.requirement.marker is None or self.requirement.marker.evaluate()


def read(lock: Path) -> list[Locked]:
    """Each line of a lock. Raises ValueError where one has no version."""
    text = re.sub(r"\\\n", " ", lock.read_text())
    locked = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        stated, *hashes = re.split(r"\s+--hash=", line.split(" #")[0].strip())
        requirement = Requirement(stated)
        (version,) = (str(specifier.version) for specifier in requirement.specifier if specifier.operator == "==")
        locked.append(Locked(canonicalize_name(requirement.name), version, requirement, tuple(hashes)))
    return locked


def installed_by(*locks: str) -> dict[str, Locked]:
    """What this machine installs from locks of these names, by package."""
    return {locked.name: locked for lock in locks for locked in read(REQUIREMENTS / f"{lock}.txt") if locked.here}
