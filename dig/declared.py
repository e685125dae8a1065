"""What DiG says of itself to `dig.registry`. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dig.family import BACKEND, Family, Look, Signature
from dig.registry import register

if TYPE_CHECKING:
    import torch

    from dig.layers import Backbone
    from dig.operation import Operation

FLA_KERNELS = r"chunk_gla_fwd|chunk_fwd_kernel_h|fused_recurrent_gla|fused_chunk_gla"
"""Of flash-linear-attention's forward pass."""


def _build(size: str, **fields: Any) -> Backbone:
    from dig.model import SIZES, DiG, DiGConfig, heads_of

    depth, width, _ = SIZES[size]
    heads = heads_of(size, "release" if fields.get("variant") == "release" else "paper")
    return DiG(DiGConfig(depth=depth, width=width, heads=heads, **fields))


def _operation(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    from dig.ops.gla.operation import mixer_of

    return mixer_of(model, batch, dtype)


DIG = register(
    Family(
        name="DiG",
        cast=True,
        sizes=("S", "B", "L", "XL"),
        build=_build,
        options={
            BACKEND: ("reference", "fla", "triton"),
            "variant": ("paper", "release"),
            "scan": ("crisscross", "bidirectional", "causal"),
            "convolution": ("identity-init", "default-init", "none"),
            "skip": ("none", "linear", "identity-init"),
            "skip_order": ("released", "aligned"),
        },
        renamed={"recurrence": BACKEND},
        packages={"fla": ("fla",), "triton": ("triton",)},
        gpu_only=frozenset({"fla", "triton"}),
        on_gpu="triton",
        operation=_operation,
        tunes=frozenset({"fla"}),
        reference="DiG:reference",
        signatures={
            ("cuda", "fla"): Signature(expected=FLA_KERNELS),
            ("cuda", "triton"): Signature(kernels_in="dig.ops.gla", foreign=FLA_KERNELS),
        },
        reshaped_by=("variant", "skip"),
        look=Look(
            colors=("#D55E00", "#B8860B", "#F0A04B"),
            markers="oDp",
            dashes=("-", (0, (7, 1.5)), (0, (4, 1))),
            width=2.2,
        ),
    )
)
