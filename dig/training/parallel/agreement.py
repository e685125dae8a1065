"""What must be the same on all ranks, compared before anything of it is used: code, versions, options, data."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import dig
from dig.family import Family
from dig.registry import parse_name
from dig.training.config import TrainConfig
from dig.training.parallel.ranks import Ranks


class RanksDifferError(ValueError):
    """Ranks of one job would train different things; the message says which ranks, and in what."""


def code_sha256(package: Path = Path(dig.__file__).parent) -> str:
    """SHA-256 of every Python file of the package, with its name; or of a module that is a file."""
    digest = hashlib.sha256()
    for path in [package] if package.is_file() else sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def family_sha256(family: Family) -> str:
    """`code_sha256` of what builds a family's models: its module, with all that is beside it in a package.

    The baselines, and families of one's own, are not under ``dig/``. Empty for what is, and where no file holds it.
    """
    build = getattr(family.build, "func", family.build)  # of a functools.partial
    module = sys.modules.get(getattr(build, "__module__", ""))
    file = getattr(module, "__file__", None)
    if file is None or Path(file).is_relative_to(Path(dig.__file__).parent):
        return ""
    return code_sha256(Path(file).parent if getattr(module, "__package__", "") else Path(file))


def facts(config: TrainConfig) -> dict[str, str]:
    """What of this process has to be as in the others, by what it is called in a message."""
    content = config.to_json()
    data: dict[str, Any] = content.pop("data")
    family = parse_name(config.model.name)[0]
    return {
        "code under dig/": code_sha256(),
        f"code of {family.name}": family_sha256(family),
        "torch": torch.__version__,
        "Python": platform.python_version(),
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
