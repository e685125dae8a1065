"""Files that are whole or not there, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The only way to read it is to set it; done once, before there are threads to disturb.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file under, which becomes ``path`` when the block ends without an exception.

    At any moment, a kill or a power cut included, ``path`` holds the old content or the new. The temporary file lies
    beside it, under a name that the next attempt uses again, so that kills leave no growing heap of them.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    # safetensors makes files that only their owner may read.
    temporary.chmod(0o666 & ~_UMASK)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whose content is at hand: see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
