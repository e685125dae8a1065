"""What options hold: words and numbers with commas between them, one word of several, a file. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated

import typer

from bench.messages import check_count, one_of, refuse, say
from bench.store.files import require_appendable
from dig.family import Family, closest
from dig.registry import PATCHES

Weights = Annotated[str, typer.Option(help="fp32 (autocast) or bf16 (a forward pass of a model that was cast).")]
CompileScope = Annotated[
    str, typer.Option(help="What one compilation covers: block (one for all blocks of a kind, seconds) or model.")
]


def words(text: str) -> list[str]:
    """The words of a list, each once."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in (repeated := [word for word, count in Counter(found).items() if count > 1]):
        say(f"{word} stands {found.count(word)} times in {text}; it counts once", err=True)
    return list(dict.fromkeys(found)) if repeated else found


def numbers(text: str, option: str, *, least: int = 1, empty: bool = False) -> list[int]:
    """The whole numbers of a list, each at least ``least``; none at all only if the list may be empty."""
    found = []
    for word in words(text):
        if not (word.isascii() and word.removeprefix("-").isdecimal() and len(word) <= 20):
            refuse(f"{option} takes whole numbers separated by commas; got {text[:80]!r}")
        check_count(int(word), option, least=least)
        found.append(int(word))
    return found if found or empty else refuse(f"{option} needs at least one number")


def some_of(text: str, option: str, known: Collection[str]) -> list[str]:
    """The words of a list, each one that is known; at least one."""
    found = words(text)
    for word in found:
        one_of(word, option, known)
    return found or refuse(f"{option} needs at least one of {', '.join(known)}")


def check_patch(patch: int, option: str = "--patch") -> None:
    """Refuse a patch that no model has."""
    check_count(patch, option)
    if patch not in PATCHES:
        refuse(f"{option} must be one of {', '.join(map(str, PATCHES))}; got {min(patch, 10**20)}")


def check_sizes(sizes: Iterable[str], option: str, families: Iterable[Family]) -> None:
    """Refuse a size that one of the families has not."""
    for family in families:
        for size in sizes:
            if size not in family.sizes:
                refuse(f"unknown {option} {size[:80]!r} of {family.name}: {closest(size, family.sizes)}")


def check_appendable(path: Path | None, option: str) -> None:
    """Refuse, before anything is measured for it, a file that cannot be appended to."""
    if path is None:
        return
    try:
        require_appendable(path)
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another {option}")
