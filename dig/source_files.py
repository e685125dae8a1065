"""Which files a measurement or a training job runs, and one number for what is in them. No torch here."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from dig.family import Family, FamilyError

MODELS = "dig"
"""The package that every model stands on."""


def digest_of(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name, path in sorted(set(files)):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def sources_of(root: Path, beside: Path) -> list[tuple[str, Path]]:
    """A file, or a folder's Python files, each with its name as seen from another folder."""
    found = [root] if root.is_file() else [path for path in root.rglob("*.py") if path.is_file()]
    return [(path.relative_to(beside).as_posix(), path) for path in found]


def family_files(family: Family) -> list[tuple[str, Path]]:
    """A family's own source files by name: its module, or the whole package where that is in one, and `Family.files`.

    Of ``dig``'s own families there are none: whoever looks at theirs looks at all of ``dig``.

    Raises:
        FamilyError: A file that the family names is not there, or nobody knows where it is from.
    """
    build = getattr(family.build, "func", family.build)  # of a functools.partial
    module = str(getattr(build, "__module__", ""))
    package = module.partition(".")[0]
    if package == MODELS:
        return []
    found: list[tuple[str, Path]] = []
    loaded = sys.modules.get(package)
    for folder in getattr(loaded, "__path__", ()):
        found += sources_of(Path(folder), Path(folder).parent)
    if not hasattr(loaded, "__path__") and (file := getattr(loaded, "__file__", None)) is not None:
        found += sources_of(Path(file), Path(file).parent)
    for name in family.files:
        path = Path(name)
        if not path.exists():
            raise FamilyError(f"{family.name} names the source file {name}, which is not there")
        found += sources_of(path, path.parent)
    if not found:
        raise FamilyError(f"nobody knows the source files of {family.name}; name them in its files=")
    return found
