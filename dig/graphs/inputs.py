"""The tensors that a graph reads its inputs from, wherever they are in tuples, lists and dictionaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from dig.graphs.recording import CaptureError


class StaticInputs:
    """Copies of a step's inputs on the graph's device, overwritten before each replay.

    Args:
        inputs: Positional arguments of the step: tensors, of this device or of the CPU, and whatever else; what isn't a
            tensor is a constant of the graph.
        device: Where the graph will run.

    Attributes:
        tree: The copies, nested as the inputs are.
    """

    def __init__(self, inputs: tuple[Any, ...], device: torch.device) -> None:
        self._device = device
        paths, self._spec = tree_flatten_with_path(inputs)
        self._names = [f"input {keystr(path)}" for path, _ in paths]
        for name, (_, leaf) in zip(self._names, paths, strict=True):
            if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
                raise CaptureError(f"{name} is {leaf.layout}; a captured step takes dense tensors")
        self._leaves = [self._copy(leaf) if isinstance(leaf, Tensor) else leaf for _, leaf in paths]
        self.tree: tuple[Any, ...] = tree_unflatten(self._leaves, self._spec)

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_like(tensor, device=self._device, requires_grad=False)
        return copy.copy_(tensor.detach(), non_blocking=True).requires_grad_(tensor.requires_grad)

    def drop_gradients(self) -> None:
        """Forget what a backward pass left at the copies."""
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                leaf.grad = None

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Overwrite the copies with other inputs. A copy given as its own input is left alone.

        Raises:
            CaptureError: They have other shapes, dtypes, devices, numbers or structure; nothing is overwritten then.
        """
        leaves, spec = tree_flatten(inputs)
        if spec != self._spec:
            raise CaptureError(f"the inputs are {spec} now and were {self._spec} at the capture; capture this form too")
        for name, ours, theirs in zip(self._names, self._leaves, leaves, strict=True):
            self._check(name, ours, theirs)
        with torch.no_grad():
            for ours, theirs in zip(self._leaves, leaves, strict=True):
                if isinstance(ours, Tensor) and ours is not theirs:
                    # From memory that isn't pinned CUDA copies what it needs before this returns.
                    ours.copy_(theirs, non_blocking=True)

    def _check(self, name: str, ours: Any, theirs: Any) -> None:
        if not isinstance(ours, Tensor):
            if isinstance(theirs, Tensor) or type(theirs) is not type(ours) or theirs != ours:
                raise CaptureError(
                    f"{name} is {_say(theirs)} now and was {_say(ours)} at the capture, a constant of the graph; pass "
                    "what changes as a tensor"
                )
            return
        if not isinstance(theirs, Tensor):
            raise CaptureError(f"{name} is {_say(theirs)} now and was {_say(ours)} at the capture; pass a tensor")
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype or theirs.layout != ours.layout:
            raise CaptureError(
                f"{name} is {_say(theirs)} now and was {_say(ours)} at the capture; pad or convert it, or capture the "
                "step for this one too"
            )
        if theirs.device != ours.device and theirs.device.type != "cpu":
            raise CaptureError(f"{name} is on {theirs.device}, the graph on {ours.device}; move it")


def _say(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} {value!r}"[:60]
