"""Tensors that may be sharded over ranks (DTensors): this rank's share of one, and all of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor that may be sharded; under `torch.no_grad`, what is written there is written in it.

    Of one that isn't sharded, itself.
    """
    sharded: Any = tensor
    share: Tensor = sharded.to_local() if hasattr(sharded, "to_local") else tensor
    return share


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered: all ranks must ask for it."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else tensor
    return gathered
