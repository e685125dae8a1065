"""What every operation needs around its launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, as Triton's launches ask for; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape and device, contiguous whatever the strides of x; of x's dtype unless another is given."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def last_contiguous(tensor: Tensor) -> Tensor:
    """A gradient as autograd hands it over, copied only if its last dimension isn't contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
