"""Where a model's blocks are: what is recomputed, compiled or sharded piece by piece."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in order.

    A block is a member of a `ModuleList` whose name ends in ``blocks``, or a module whose name ends in ``block``.

    Raises:
        ValueError: The model has none.
    """
    blocks: list[nn.Module] = []
    for name, child in model.named_children():
        if name.endswith("blocks") and isinstance(child, nn.ModuleList):
            blocks += list(child)
        elif name.endswith("block"):
            blocks.append(child)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks: no module list's name ends in blocks")
    return blocks
