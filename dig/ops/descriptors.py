"""Tensor descriptors of Triton's, made again and again for tensors of one shape: checked once, then unchecked."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Box = tuple[list[int], list[int], list[int]]
"""Of a tensor descriptor: shape, strides, and the shape of a tile."""


def without_tensor(argument: Any) -> dict[str, Any] | None:
    """What a tensor descriptor holds but its tensor, which would live on with it; None of something else."""
    if not isinstance(argument, TensorDescriptor):
        return None
    return {name: value for name, value in vars(argument).items() if name != "base"}


def described(tensor: Tensor, of: dict[str, Any]) -> TensorDescriptor:
    """A tensor's descriptor, unchecked: one of the same box has been checked, and of the tensor its address."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {"base": tensor, **of}
    return made
