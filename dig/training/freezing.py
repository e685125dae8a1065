"""What of a model isn't trained, by patterns of names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn


def matching(names: Sequence[str], patterns: Sequence[str], *, option: str, what: str) -> list[str]:
    """The names that a pattern matches, as a shell's do: ``blocks.0.*``.

    Raises:
        ValueError: A pattern matches none of them.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"{option} {pattern!r} matches no {what}; names are {names[0]}, {names[len(names) // 2]}, {names[-1]} "
                "and the like"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters out of training whose names a pattern matches.

    Raises:
        ValueError: A pattern matches none, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for name in matching(list(parameters), patterns, option="--freeze", what="parameter"):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train")
