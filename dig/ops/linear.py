"""Products around the kernels: what autograd would do for a linear layer, in fewer passes over memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Let products within be computed in the dtype of their operands; where autocast is off, that costs nothing."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """``dy^T x``: the gradient of a linear layer's weight (N, K) from dy (M, N) and its input x (M, K).

    On a GPU the product of bf16 operands is added up in fp32, and written in the weight's dtype: for an fp32 weight
    bf16 would lose bits and take another pass for the optimizer; for one in bf16 (FSDP's) fp32 would take that pass.

    Args:
        dy: As above.
        x: As above, in dy's dtype.
        dtype: Of the weight, which autograd asks of its gradient.
        out: (N, K) in that dtype, contiguous, to write it into; new memory if not given. The bits are the same.
    """
    if dy.is_cuda and dy.dtype == torch.bfloat16 and dtype == torch.float32:
        if out is None:
            return torch.mm(dy.T, x, out_dtype=torch.float32)
        return torch.mm(dy.T, x, out_dtype=torch.float32, out=out)
    # Autocast sees no product that is given its memory. So here a copy is what it was where it ends.
    return (dy.T @ x).to(dtype) if out is None else out.copy_(dy.T @ x)


def as_rows(tensor: Tensor) -> Tensor:
    """(B, T, D) as (B T, D), in place where the strides allow it."""
    return tensor.reshape(-1, tensor.shape[-1])
