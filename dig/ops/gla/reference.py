"""Gated linear attention in plain PyTorch: the step-by-step truth, and a chunked form fast enough to train with.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16
"""Tokens of a chunk. The pairwise decays inside a chunk take T·C·H·K numbers, so a short chunk keeps them small."""


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Eq. 6-8 of the paper, one token after the other; arguments as `gated_linear_attention`."""
    dtype = _state_dtype(v.dtype)
    qs, ks, vs = (x.to(dtype) for x in (q, k, v))
    decay = log_decay.to(dtype).exp()
    B, T, H, K = q.shape
    state = qs.new_zeros(B, H, K, v.shape[-1])
    outputs = []
    for t in range(T):
        state = decay[:, t, :, :, None] * state + ks[:, t, :, :, None] * vs[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", qs[:, t], state))
    return torch.stack(outputs, 1).to(v.dtype)


def chunked_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same recurrence, chunk by chunk; arguments as `gated_linear_attention`.

    With ``c`` the running sum of log_decay inside a chunk and S the state before it, the output of token i is
    ``(q_i e^{c_i}) S + sum_{j<=i} (q_i · k_j e^{c_i - c_j}) v_j``. No exponent is positive, so nothing overflows
    whatever the gates.
    """
    dtype = _state_dtype(v.dtype)
    B, T, H, K = q.shape
    V = v.shape[-1]
    pad = -T % CHUNK
    # Padded tokens have k = 0 and decay 1: they leave the state alone, and their outputs are cut off.
    qc, kc, vc, gc = (
        F.pad(x.to(dtype), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)
        for x in (q, k, v, log_decay)
    )  # (B, H, N, C, ·)
    c = gc.cumsum(3)
    total = c[..., -1, :]  # (B, H, N, K)

    # Masked before exp: above the diagonal the difference is positive and its exponential may be infinite.
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()[..., None]
    difference = (c[..., :, None, :] - c[..., None, :, :]).masked_fill(~causal, float("-inf"))
    scores = torch.einsum("bhnik,bhnjk,bhnijk->bhnij", qc, kc, difference.exp())
    inside = scores @ vc

    update = (kc * (total[..., None, :] - c).exp()).transpose(-1, -2) @ vc  # (B, H, N, K, V)
    carry = total.exp()[..., None]
    state = update.new_zeros(B, H, K, V)
    before = []
    for n in range(update.shape[2]):
        before.append(state)
        state = carry[:, :, n] * state + update[:, :, n]
    across = (qc * c.exp()) @ torch.stack(before, 2)
    return (inside + across).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(v.dtype)
