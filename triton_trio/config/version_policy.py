"""Which of the versions on disk are served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """One of the three: the ``latest`` n versions, the ``specific`` ones, or (neither is set) all."""

    latest: int | None = 1
    specific: tuple[int, ...] | None = None

    def select(self, available: Iterable[int]) -> list[int]:
        """The versions to serve out of those ``available``, in ascending order."""
        versions = sorted(set(available))
        if self.specific is not None:
            return [version for version in versions if version in self.specific]
        return versions if self.latest is None else versions[-self.latest :]

    @classmethod
    def read(cls, message: Any) -> VersionPolicy:
        """From a ``ModelVersionPolicy``; none set, or ``latest`` without a number, is the latest one."""
        choice = message.WhichOneof("policy_choice")
        if choice == "all":
            return cls(latest=None)
        if choice == "specific":
            return cls(latest=None, specific=tuple(message.specific.versions))
        return cls(latest=message.latest.num_versions or 1)
