"""Reading files of any kind, and writing so that a kill loses nothing that was there. No torch here."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: It cannot be read, or is something else: a FIFO would be waited for, a device may have no end.
    """
    # A FIFO that nobody writes would hold up even its opening.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return file.read()


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def require_file_or_nothing(path: Path) -> None:
    """Raise OSError where something stands at ``path`` that is no regular file."""
    with contextlib.suppress(FileNotFoundError):
        _require_regular(path, os.stat(path).st_mode)


def write_file(path: Path, content: str | bytes) -> None:
    """Put a file in place whole: until it is on the disk, what was there before stays.

    Raises:
        OSError: It cannot be written, or something else than a file is in its place.
    """
    require_file_or_nothing(path)
    target = path.resolve()  # A link stays one.
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:100]}.", delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Made for one's own eyes; a result is for everybody, as far as the umask goes.
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line and wait until it is on the disk; what a kill left of the line before ends first. Folders are made.

    Raises:
        OSError: It cannot be written, or the path is something else than a file.
    """
    require_file_or_nothing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def require_appendable(path: Path) -> None:
    """Raise OSError where `append_line` would, before anything is measured for it; an absent file is not made."""
    require_file_or_nothing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.open("ab").close()
    elif not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
