"""Files that are whole or not there, their checksums, locks, and what a file is whose name says something else."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The only way to read it is to set it; done once, before there are threads to disturb.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file under, which becomes ``path`` when the block ends without an exception.

    At any moment, a kill or a power cut included, ``path`` holds the old content or the new. The temporary file lies
    beside it. Its name cannot be foretold, so that nobody can lay a link there; what a killed process left is removed
    by the next that writes the same file.

    Raises:
        OSError: The file cannot be written; names ``path``, not the temporary file.
    """
    prefix = f".{path.name[:50]}."  # a name may have 255 bytes, and 50 characters at most 200
    _remove_abandoned(path.parent, prefix)
    temporary: Path | None = None
    descriptor = None
    try:
        descriptor, temporary = _make_temporary(path.parent, prefix)
        yield temporary
        # safetensors makes files that only their owner may read.
        temporary.chmod(0o666 & ~_UMASK)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary, str(path.parent)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _make_temporary(folder: Path, prefix: str) -> tuple[int, Path]:
    """A new file, open, and locked for as long as it is: a sign to others that its writer lives."""
    while True:
        try:
            descriptor, name = tempfile.mkstemp(".tmp", prefix, folder)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # between the two calls another process took it for abandoned


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove temporary files that no living process holds."""
    for name in glob.glob(f"{glob.escape(str(folder / prefix))}*.tmp"):
        with suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring what was renamed or removed in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends without an exception; else nothing is left of it.

    Raises:
        ValueError: Something lies there already.
        OSError: It cannot be written.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} exists and is no empty folder; choose another, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name[:50]}.", dir=path.parent))
    try:
        yield made
        made.chmod(0o777 & ~_UMASK)
        for file in (found for found in made.rglob("*") if found.is_file()):
            file.chmod(0o666 & ~_UMASK)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(made, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whose content is at hand: see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_or_keep(path: Path, content: bytes) -> None:
    """`write_atomically`; where that fails, write into the folder for temporary files and say so.

    Raises:
        ValueError: ``path`` cannot be written; the message says where the content is.
    """
    try:
        write_atomically(path, content)
        return
    except OSError as error:
        reason = error.strerror or str(error)
    try:
        kept = Path(tempfile.mkdtemp(prefix="dig-kept-")) / path.name
        write_atomically(kept, content)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({reason}), nor {tempfile.gettempdir()} ({error.strerror})") from None
    raise ValueError(f"cannot write {path} ({reason}); what belongs there is kept in {kept}")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file: all of it, or, where that fails, nothing.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab") as file:
        end = file.seek(0, os.SEEK_END)
        with path.open("rb") as before:
            before.seek(max(0, end - 1))
            cut = before.read(1) not in (b"", b"\n")  # a line that another program left without its end
        try:
            file.write(b"\n" * cut + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise OSError(error.errno, error.strerror, str(path)) from None


def prepare_output(path: Path) -> None:
    """Make the folder of a file that is going to be written, and see that it can be: before the work, not after.

    Raises:
        ValueError: The path is a folder or a device, or nothing can be written there.
    """
    try:
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
            raise ValueError(f"cannot write {path}: it is {kind}; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _make_temporary(path.parent, f".{path.name[:50]}.")
        os.close(descriptor)
        temporary.unlink()
        if len(os.fsencode(path.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another place") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_STARTS = (
    (b"version https://git-lfs.github.com/spec/", "a Git-LFS pointer: git lfs pull fetches the file itself"),
    (b"<!doctype html", "an HTML page: the download went wrong"),
    (b"<html", "an HTML page: the download went wrong"),
    (b"<?xml", "XML: the download went wrong"),
    (b"{", "text, perhaps JSON"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x89png", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"gif8", "a GIF image"),
    (b"%pdf", "a PDF"),
    (b"\x93numpy", "an .npy array"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
)


def told_by_start(path: str | bytes | Path) -> str:
    """``; it is an HTML page: ...``: what a file that is not what its name says is, or nothing where that is unknown.

    For messages: people meet web pages and Git-LFS pointers under the names of data far more often than damage.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "; it is no ordinary file"
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return ""
    if not start:
        return "; it is empty"
    if not start.strip(b"\0"):
        return "; it begins with zeros, as files do whose writing was cut off"
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, kind in _STARTS:
        if start.startswith(beginning):
            return f"; it is {kind}"
    return ""


def shown(name: str) -> str:
    """A file's name as it can be printed: what is not text, and what moves a terminal's cursor, escaped."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode("ascii") for one in name
    )
