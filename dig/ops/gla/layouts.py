"""Where the inputs of gated linear attention lie, and where its gradients go: tensors of their own, or parts of others.

The model's mixer reads q, k, v and both gates where one projection left them, and writes the gradient of the whole row.
A view of each would take the host longer than a launch does. So launches are told of parts (`dig.ops.launch.Launch`),
and all that follows from where these lie is found once a shape.

Shapes: B batch, T tokens, H heads, K key width, V value width, R rank of the decay gate.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.whole import power_of_two


class Outline(NamedTuple):
    """What a plan asks of queries or values (B, T, H, width) that are part of a tensor: nobody needs a view of them."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head of each, one after the other."""
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += tensor.stride()[:3]
    return strides


@dataclass(frozen=True, kw_only=True)
class DecayGate:
    """What the decays of a call come from.

    Attributes:
        values: Log decays or gate logits (B, T, H, K), or with weight and bias the low-rank factor (B, T, R) of the
            logits, from which the kernels compute them: at rank 16 that takes less than reading them.
        logits: Whether the log decays are still to be computed.
        weight: (H K, R), with values (B, T, R) only.
        bias: (H K,), likewise.
    """

    values: Tensor
    logits: bool
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels take them; a pointer that a kernel does not touch can be anything."""
        if self.weight is None or self.bias is None:
            return self.values, self.values, self.values
        return self.values, self.weight, self.bias

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, token and head."""
        batch, token, head, *_ = self.values.stride()
        return batch, token, head if self.weight is None else 0

    @property
    def constants(self) -> dict[str, Any]:
        """R is 0 without a weight."""
        return gate_constants(0 if self.weight is None else self.weight.shape[1], self.logits)


def gate_constants(rank: int, logits: bool) -> dict[str, Any]:
    """`DecayGate.constants` of a gate of this rank."""
    return {"R": rank, "RP": max(16, power_of_two(rank)), "LOGITS": logits}


Part = tuple[int, int]
"""Which of some tensors, and the first of its elements."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where the inputs of a call lie in the tensors that hold them; equal to itself alone, as `Plan`.

    Attributes:
        tensors: How many these are.
        qkv: q, k and v.
        gate: Of the decay gate, as `DecayGate.tensors`.
        g: The output gate.
        qkv_strides: Of batch, token and head of each, one after the other.
        gate_strides: Likewise.
        g_strides: Likewise.
        constants: The decay gate's.
    """

    tensors: int
    qkv: tuple[Part, Part, Part]
    gate: tuple[Part, Part, Part]
    g: Part
    qkv_strides: tuple[int, ...]
    gate_strides: tuple[int, ...]
    g_strides: tuple[int, ...]
    constants: dict[str, Any]


class Rows(NamedTuple):
    """The inputs of a call: the tensors that hold them, and where they lie in those."""

    tensors: tuple[Tensor, ...]
    layout: Layout


def rows_of(q: Tensor, k: Tensor, v: Tensor, gate: DecayGate, g: Tensor | None = None) -> Rows:
    """Inputs that are tensors of their own."""
    g = v if g is None else g
    rank = gate.constants["R"]
    layout = _separate(strides_of(q, k, v), gate.strides, strides_of(g), rank, gate.logits)
    return Rows((q, k, v, *gate.tensors, g), layout)


@functools.lru_cache(maxsize=1024)
def _separate(qkv: tuple[int, ...], gate: tuple[int, ...], g: tuple[int, ...], rank: int, logits: bool) -> Layout:
    return Layout(
        tensors=7,
        qkv=((0, 0), (1, 0), (2, 0)),
        gate=((3, 0), (4, 0), (5, 0)),
        g=(6, 0),
        qkv_strides=qkv,
        gate_strides=gate,
        g_strides=g,
        constants=gate_constants(rank, logits),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Where the gradients of q, k, v, the log decays or logits, and the output gate go; equal to itself alone.

    Attributes:
        tensors: How many tensors hold them. Heads lie packed in each of their tokens.
        parts: Each in those.
        strides: Of a token of each.
    """

    tensors: int
    parts: tuple[Part, Part, Part, Part, Part]
    strides: tuple[int, int, int, int, int]


@functools.lru_cache(maxsize=1024)
def slots_apart(*strides: int) -> Slots:
    """Gradients in tensors of their own, whose tokens are so far apart; without an output gate's, the last is any."""
    q, k, v, gate, g = strides
    return Slots(tensors=5, parts=((0, 0), (1, 0), (2, 0), (3, 0), (4, 0)), strides=(q, k, v, gate, g))
