"""flash-linear-attention's chunked kernel: what the published DiG runs on, kept as the peer to compare with."""

from __future__ import annotations

from torch import Tensor

from dig.packages import require


def fla_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """``fla.ops.gla.chunk_gla`` on our arguments (see `gated_linear_attention`). NVIDIA GPUs only.

    Raises:
        MissingPackageError: flash-linear-attention is not installed.
        ValueError: The tensors are not on a CUDA device.
    """
    if not q.is_cuda:
        raise ValueError(f"implementation 'fla' needs tensors on a CUDA device; q is on {q.device}")
    gla = require("fla.ops.gla", "implementation 'fla'")
    # fla makes contiguous copies of what is not: slices of a fused projection cost one each.
    output, _ = gla.chunk_gla(q, k, v, log_decay, scale=1.0)
    return output
