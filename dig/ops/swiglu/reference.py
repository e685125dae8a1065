"""SwiGLU in PyTorch, as its formula reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_swiglu(gate_up: Tensor) -> Tensor:
    """Argument and result as `dig.ops.swiglu.swiglu`; on any device, in fp32 or, for fp64 inputs, in fp64."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
