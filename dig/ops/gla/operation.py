"""DiG's token mixer alone, with its truth: what a benchmark checks at the very shape that it times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.config import EPS
from dig.operation import Operation
from dig.ops.gla.block_reference import block_reference
from dig.ops.gla.projection import GATE_NORMALIZER, projection_splits, split_projection
from dig.scan import RASTER, Route

if TYPE_CHECKING:
    from dig.layers import Backbone

PARTS = ("q", "k", "v", "gate", "decay")


def mixer_of(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    """Decay gate, recurrence, norm and output gate of a DiG's first block, with its weights; see `dig.operation`.

    Its inputs are the parts of the block's projection, (B, T, D/2) or (B, T, D) each, in the order that it is scanned.
    """
    found: Any = model
    attention, config = found.blocks[0].attn, found.config
    device = next(model.parameters()).device
    rows, columns = model.grid
    shapes = [(batch, rows * columns, width) for width in projection_splits(config.width)]
    inputs = {name: torch.randn(shape, device=device).to(dtype) for name, shape in zip(PARTS, shapes, strict=True)}
    # The first token's output is (q . k) v before its norm. Of many heads some have a q . k next to 0, which the norm
    # divides by: their gradients dwarf all others, and are nothing but rounding.
    inputs["k"][:, 0] = inputs["q"][:, 0]
    weight, bias, norm = (
        tensor.detach().float()
        for tensor in (attention.decay_proj.weight, attention.decay_proj.bias, attention.norm_weight)
    )
    route = Route(grid=model.grid, source=RASTER, order=RASTER, target=RASTER)

    def run(given: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            mixed: Tensor = attention.mix(torch.cat([given[name] for name in PARTS], dim=-1), route)
        return mixed

    def truth(given: Mapping[str, Tensor]) -> Tensor:
        q, k, v, gate, low = split_projection(torch.cat([given[name] for name in PARTS], dim=-1), config.heads)
        logits = F.linear(low, weight, bias).unflatten(-1, (config.heads, -1))
        mixed = block_reference(
            q, k, v, logits, gate, norm, scale=q.shape[-1] ** -0.5, gate_normalizer=GATE_NORMALIZER, eps=EPS
        )
        return mixed.flatten(2)

    return Operation(inputs=inputs, run=run, truth=truth, per_token=frozenset(PARTS))
