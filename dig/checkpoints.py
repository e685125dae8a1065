"""The published DiG's parameter names, to and from ours.

The authors' code keeps q, k, v, the output gate and the two factors of the decay gate as layers of their own; here the
five that read the same input are one matrix. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dig.ops.gla.projection import projection_splits

_FUSED = (
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.g_proj.weight",
    "attn.gk_proj.0.weight",
)
_RENAMED = {
    "attn.gk_proj.1.weight": "attn.decay_proj.weight",
    "attn.gk_proj.1.bias": "attn.decay_proj.bias",
    "attn.g_norm_swish_gate.weight": "attn.norm_weight",
}
_OURS = {ours: theirs for theirs, ours in _RENAMED.items()}
_IN_PROJ = "attn.in_proj.weight"


def _block_of(name: str) -> tuple[str, str]:
    """``blocks.3.attn.x`` to (``blocks.3.``, ``attn.x``); a name outside the blocks to ("", name)."""
    if not name.startswith("blocks."):
        return "", name
    block, _, rest = name.removeprefix("blocks.").partition(".")
    return f"blocks.{block}.", rest


def from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to ours; load the result with ``strict=True``.

    Args:
        state_dict: As the authors' code saves it. A tensor under a name that DiG does not have stays under it, so that
            strict loading names it.

    Raises:
        KeyError: A block lacks one of the projections that are fused here; the message names it.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        prefix, rest = _block_of(name)
        if prefix and rest in _FUSED:
            if f"{prefix}{_IN_PROJ}" not in result:
                missing = [part for part in _FUSED if f"{prefix}{part}" not in state_dict]
                if missing:
                    raise KeyError(
                        f"the checkpoint has {name} but lacks {', '.join(prefix + part for part in missing)}"
                    )
                result[f"{prefix}{_IN_PROJ}"] = torch.cat([state_dict[f"{prefix}{part}"] for part in _FUSED])
        else:
            result[prefix + (_RENAMED.get(rest, rest) if prefix else rest)] = tensor
    return result


def to_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to the published ones: the inverse of `from_release`."""
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        prefix, rest = _block_of(name)
        if prefix and rest == _IN_PROJ:
            parts = tensor.split(projection_splits(tensor.shape[1]))
            result.update((prefix + part, weight.clone()) for part, weight in zip(_FUSED, parts, strict=True))
        else:
            result[prefix + (_OURS.get(rest, rest) if prefix else rest)] = tensor
    return result
