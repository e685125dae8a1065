"""What a training step keeps for its backward pass, counted on tensors without memory: nothing runs.

PyTorch's own ledger says it: `torch.autograd.graph.saved_tensors_hooks` sees every tensor that a forward pass saves. A
model's layers save numbers for each token, and attention that forms its matrix numbers for each pair of them, so what
is saved is a polynomial of second degree in the tokens. Three small inputs give it for any size of input.

Shapes: B samples at once, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dig.flops import EqualBlocks
from dig.layers import Backbone
from dig.meta import on_meta
from dig.registry import parse_name
from dig.spec import ModelSpec
from dig.training.step import stop_dropping_labels

SIDES = (4, 8, 12)
"""Patches along a side of the inputs that are counted: multiples of the chunks in which a recurrence may run."""


def without_memory(model: Backbone) -> dict[str, Tensor]:
    """Weights like a model's, of the fake tensors of the mode that is on, for `torch.func.functional_call`.

    A model is built on ``meta``: under a mode of fake tensors some initialisations write number by number.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad
        )
        for name, tensor in named
    }


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that a forward pass saves for its backward pass.

    Attributes:
        each: For a sample.
        once: However many there are: copies of weights in autocast's dtype.
        blocks: How many blocks of the model they are of.
    """

    each: int
    once: int
    blocks: int


def count_saved(spec: ModelSpec, *, bf16: bool) -> Saved | None:
    """Count what a model saves on a CPU, beside its weights and input.

    Args:
        spec: The model, on a backend that runs there.
        bf16: Whether it runs in autocast.

    Returns:
        None where it can't be counted: the model reads values, say, or takes no small inputs.
    """
    patch = parse_name(spec.name)[2]
    try:
        points: list[tuple[int, int]] = []
        once, blocks = 0, 1
        for side in SIDES:
            with on_meta():
                model = dataclasses.replace(spec, input_size=(side * patch, side * patch)).build().train()
            stop_dropping_labels(model)
            found = _count(model, 1, bf16=bf16)
            if not points:
                blocks = sum(len(part) for part in model.children() if isinstance(part, nn.ModuleList)) or 1
                once = max(0, 2 * found - _count(model, 2, bf16=bf16)) if bf16 else 0
            points.append((side * side, found - once))
    except Exception:  # Anybody's model may raise anything here.
        return None
    tokens = math.prod(side // patch for side in spec.input_size)
    return Saved(each=max(0, round(_through(points, tokens))), once=once, blocks=blocks)


def _through(points: Sequence[tuple[int, int]], x: int) -> Fraction:
    """The value at x of the polynomial of least degree through these points (Lagrange's form)."""
    total = Fraction(0)
    for at, value in points:
        total += value * math.prod(
            (Fraction(x - other, at - other) for other, _ in points if other != at), start=Fraction(1)
        )
    return total


def _count(model: Backbone, batch: int, *, bf16: bool) -> int:
    """Bytes that a model, built on ``meta``, saves for a batch."""
    kept: dict[int, Any] = {}
    own: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # Held, so that no other one gets its number.
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = without_memory(model)
        own |= {tensor.untyped_storage()._cdata for tensor in weights.values()}
        x = torch.empty(batch, model.in_channels, *model.input_size)
        own.add(x.untyped_storage()._cdata)
        t, y = torch.empty(batch), torch.empty(batch, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
            EqualBlocks(model, total) as blocks,
        ):
            torch.func.functional_call(model, weights, (x, t, y))
        return total() + blocks.repeated
