"""What must be the same on all ranks, compared before anything of it is used: code, versions, options, data."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from pathlib import Path
from typing import Any

import torch

import dig
from dig.family import Family, FamilyError
from dig.registry import parse_name
from dig.source_files import digest_of, family_files, sources_of
from dig.training.config import TrainConfig
from dig.training.parallel.ranks import Ranks

SEEN_SECONDS = 10.0
"""How long a file that one machine wrote may take to be there for the others, which remember what a folder held."""


class RanksDifferError(ValueError):
    """Ranks of one job would train different things; the message says which ranks, and in what."""


def code_sha256() -> str:
    """Of every Python file under ``dig/``, with its name."""
    package = Path(dig.__file__).parent
    return digest_of(sources_of(package, package))


def family_sha256(family: Family) -> str:
    """Of a family's own files: the baselines, and families of one's own, are not under ``dig/``. Empty without any."""
    try:
        files = family_files(family)
    except FamilyError:
        return ""  # Such as a class of a notebook: nobody knows where it is from.
    return digest_of(files) if files else ""


def program() -> dict[str, str]:
    """What runs, by what it is called in a message."""
    return {"code under dig/": code_sha256(), "torch": torch.__version__, "Python": platform.python_version()}


def facts(config: TrainConfig, **more: str) -> dict[str, str]:
    """What of this process has to be as in the others, by what it is called in a message.

    Args:
        config: The run.
        **more: Options beside it.
    """
    content = config.to_json() | more
    data: dict[str, Any] = content.pop("data")
    family = parse_name(config.model.name)[0]
    return {
        **program(),
        f"code of {family.name}": family_sha256(family),
        "data": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        **{f"option {name}": json.dumps(value, sort_keys=True) for name, value in content.items()},
    }


def check_alike(ranks: Ranks, mine: dict[str, str]) -> None:
    """Raise `RanksDifferError`, on all ranks, unless all give the same facts.

    Args:
        ranks: All of which must ask.
        mine: This rank's facts: `facts`.
    """
    found: list[dict[str, str]] = ranks.gather(mine)
    first = found[0]
    differing: dict[str, list[int]] = {}
    for rank, theirs in enumerate(found):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                differing.setdefault(name, []).append(rank)
    if not differing:
        return
    name, others = next(iter(differing.items()))
    ours, other = str(first.get(name)), str(found[others[0]].get(name))
    more = f" (and other {', '.join(list(differing)[1:5])})" if len(differing) > 1 else ""
    who = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others[:8]))}"
    raise RanksDifferError(
        f"{who} has other {name} than rank 0 ({other[:16]}, {ours[:16]}){more}: one job needs the same on all "
        "machines; bring them to the same commit, environment, options and data"
    )


def check_one_folder(ranks: Ranks, folder: Path) -> None:
    """Raise `RanksDifferError`, on all ranks, unless a folder is the same one for all: they see what rank 0 writes.

    Args:
        ranks: All of which must ask.
        folder: As this rank names it; rank 0's is there.
    """
    name: str = ranks.from_leader(f".job-{secrets.token_hex(8)}.tmp")
    mark = folder / name
    if ranks.leads:
        mark.touch()
    ranks.gather(None)  # It is there now.
    try:
        found: list[bool] = ranks.gather(_appears(mark))
    finally:
        if ranks.leads:
            mark.unlink(missing_ok=True)
    others = [rank for rank, sees in enumerate(found) if not sees]
    if others:
        who = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others[:8]))}"
        raise RanksDifferError(
            f"{who} can't see in {folder} what rank 0 writes there: all ranks write into one folder, so name the same "
            "one on each, on a disk that all machines share"
        )


def _appears(mark: Path) -> bool:
    """Whether a file is there, or comes soon."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
