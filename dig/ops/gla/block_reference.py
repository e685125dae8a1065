"""DiG's recurrence with everything around it that belongs to one head, in plain PyTorch: what `gla_block` computes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dig.ops.gla.reference import chunked_gla


def block_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    *,
    scale: float,
    gate_normalizer: float = 16.0,
    eps: float = 1e-6,
) -> Tensor:
    """Gate activation, recurrence, RMSNorm over each head's output, output gate; arguments as `gla_block`.

    With B batch, T tokens, H heads: q, k, gate_logits (B, T, H, K), v and g (B, T, H, V), norm_weight (V,).
    Returns (B, T, H, V) in v's dtype. Computed in fp32, or in fp64 for fp64 inputs.
    """
    dtype = v.dtype
    wide = dtype if dtype.itemsize == 8 else g.float().dtype
    q, k, v, gate_logits, g, norm_weight = (x.to(wide) for x in (q, k, v, gate_logits, g, norm_weight))
    o = chunked_gla(q * scale, k, v, F.logsigmoid(gate_logits) / gate_normalizer)
    normed = F.rms_norm(o, (o.shape[-1],), norm_weight, eps)
    return (normed * F.silu(g)).to(dtype)
