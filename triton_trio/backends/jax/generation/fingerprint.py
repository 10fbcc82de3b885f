"""What a model's files hold, in a few bytes, so that hosts can tell whether theirs hold the same.

To read all of a large model only for that would take as long as to load it.  So of a large file there are samples; see
:func:`fingerprint` for what they show.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Bytes at the beginning of a file: names, shapes and types of its tensors, and vocabularies.
HEAD = 1 << 24
#: Bytes of a sample, and how many there are: a file of up to their product is read as a whole.
SAMPLE, SAMPLES = 1 << 12, 1 << 16


def fingerprint(path: Path) -> str:
    """Of a checkpoint's ``path``: the same for the same weights, wherever they are.

    Of each file it has the size, the first 16 MiB, and 256 MiB in 65,536 samples that are evenly spread: in a file of 140 GB one
    every 2 MiB.  So it shows another model, another training, a file that was cut short or damaged over some length, and
    every byte of a file of up to 256 MiB; in a larger one it does not show that only a few numbers are others.

    Blocking.  Raises :exc:`OSError`: a file is not there any more.
    """
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as data:
            size = file.stat().st_size
            found.update(size.to_bytes(8, "little"))
            found.update(data.read(min(HEAD, size)))
            for at in range(0, size, max(SAMPLE, size // SAMPLES)):
                data.seek(at)
                found.update(data.read(SAMPLE))
    return found.hexdigest()
