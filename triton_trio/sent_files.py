"""Model files that came with a load request (``file:<path>`` parameters), on disk for as long as a version needs them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType

from .errors import InvalidArgument


class SentFiles:
    """A temporary model directory with several owners: the load, then each version loaded from it.

    Each owner holds it as a context manager; the last one to leave removes it.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str], directory: Path) -> None:
        self.directory = directory
        self._folder = folder
        self._owners = 0

    @classmethod
    def write(cls, name: str, files: Mapping[str, bytes]) -> SentFiles:
        """Write ``files`` (contents by relative path) into a new directory for the model ``name``; blocks."""
        for path in (name, *files):
            parts = PurePosixPath(path).parts
            if not parts or path.startswith("/") or ".." in parts:
                raise InvalidArgument(
                    f"failed to load '{name}': '{path}' must be a path below the model's directory, such as 1/model.py"
                )
        folder = tempfile.TemporaryDirectory(prefix="triton_trio-")
        directory = Path(folder.name) / name
        for path, content in files.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return cls(folder, directory)

    def __enter__(self) -> SentFiles:
        self._owners += 1
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._owners -= 1
        if not self._owners:
            self._folder.cleanup()
