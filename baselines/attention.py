"""FLOPs of FlashAttention's own operations, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from dig.packages import require

Shape = Sequence[int]


def _head_major(x: Shape) -> tuple[int, int, int, int]:
    """(B, T, H, K) to (B, H, T, K)."""
    B, T, H, K = x
    return B, H, T, K


def _forward(q: Shape, k: Shape, v: Shape, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(*map(_head_major, (q, k, v))))


def _backward(dout: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(*map(_head_major, (dout, q, k, v))))


def require_flash_attention() -> None:
    """Import the package flash-attn, and give its operations formulas.

    Raises:
        MissingPackageError: It is not installed.
    """
    require("flash_attn", "backend='flash-attn'")
    for name, formula in (("_flash_attn_forward", _forward), ("_flash_attn_backward", _backward)):
        operation = getattr(torch.ops.flash_attn, name, None)
        if operation is not None and operation not in flop_registry:
            register_flop_formula(operation)(formula)
