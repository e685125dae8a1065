"""What DiT, Flash-DiT and DiS say of themselves to `dig.registry`. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dig.family import BACKEND, Family, Look, Signature
from dig.registry import register

if TYPE_CHECKING:
    import torch

    from dig.layers import Backbone
    from dig.operation import Operation

ATTENTIONS = ("sdpa-flash", "sdpa-cudnn", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-attn-4-padded")
"""Flash-DiT's, by `baselines.attention`; only the first runs on a CPU too."""

# Names as the profiler gives them: cuDNN's say cudnn_generated_fort_native_sdpa_sm90_flash_fprop_..., flash-attn's
# flash::flash_fwd_kernel<...>, PyTorch's copy of the latter pytorch_flash::flash_fwd_kernel<...>.
_FUSED_ATTENTION = r"flash_fwd|fmha|cudnn\w*(sdpa|flash|mha)|efficient_attention|scaled_dot_product_\w*flash"
_SOFTMAX = r"(?i:softmax)"
_CUTE = r"(?i:cut(e|lass)\w*flash\w*fwd|flash_attn\w*cute)"


def _build_dit(size: str, **fields: Any) -> Backbone:
    from baselines.dit import SIZES, DiT, DiTConfig

    depth, width, heads = SIZES[size]
    return DiT(DiTConfig(depth=depth, width=width, heads=heads, **fields))


def _attention_of(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    from baselines.attention import attention_of

    return attention_of(model, batch, dtype)


def _scan_of(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    from baselines.selective_scan import scan_of

    return scan_of(model, batch, dtype)


def _build_dis(size: str, **fields: Any) -> Backbone:
    from baselines.dis import SIZES, DiS, DiSConfig

    depth, width = SIZES[size]
    return DiS(DiSConfig(depth=depth, width=width, **fields))


# Hues of Okabe and Ito's palette, which colour-blind readers can tell apart, each in three shades.
DIT = register(
    Family(
        name="DiT",
        cast=True,
        sizes=("S", "B", "L", "XL"),
        build=_build_dit,
        options={BACKEND: ("materialized",)},
        renamed={"attention": BACKEND},
        operation=_attention_of,
        reference="DiT:materialized",
        signatures={
            ("cuda", "materialized"): Signature(expected=_SOFTMAX, foreign=_FUSED_ATTENTION),
            ("cpu", "materialized"): Signature(expected=_SOFTMAX, foreign=_FUSED_ATTENTION),
        },
        look=Look(
            colors=("#222222", "#777777", "#AAAAAA"),
            markers="^<>",
            dashes=((0, (1, 1.2)), (0, (1, 2)), (0, (1, 3))),
        ),
    )
)

FLASH_DIT = register(
    Family(
        name="Flash-DiT",
        cast=True,
        sizes=("S", "B", "L", "XL"),
        build=_build_dit,
        options={BACKEND: ATTENTIONS},
        renamed={"attention": BACKEND},
        packages={
            "flash-attn": ("flash_attn",),
            "flash-attn-3": ("flash_attn_interface",),
            "flash-attn-4": ("flash_attn.cute",),
            "flash-attn-4-padded": ("flash_attn.cute",),
        },
        gpu_only=frozenset(ATTENTIONS[1:]),
        operation=_attention_of,
        reference="DiT",
        signatures={
            ("cuda", "sdpa-cudnn"): Signature(
                expected=r"cudnn\w*(sdpa|flash|fmha|mha)", foreign=rf"flash_fwd|{_SOFTMAX}"
            ),
            ("cuda", "sdpa-flash"): Signature(
                expected=r"pytorch_flash.*flash_fwd", foreign=rf"cudnn\w*sdpa|{_SOFTMAX}"
            ),
            ("cuda", "flash-attn"): Signature(
                expected=r"flash_fwd", foreign=rf"pytorch_flash|cudnn\w*sdpa|efficient_attention|{_SOFTMAX}"
            ),
            ("cuda", "flash-attn-3"): Signature(
                expected=r"flash(?!.*cute).*(?i:fwd)", foreign=rf"pytorch_flash|cudnn\w*sdpa|{_CUTE}|{_SOFTMAX}"
            ),
            ("cuda", "flash-attn-4"): Signature(
                expected=_CUTE, foreign=rf"flash::flash_fwd|cudnn\w*sdpa|efficient_attention|{_SOFTMAX}"
            ),
            ("cuda", "flash-attn-4-padded"): Signature(
                expected=_CUTE, foreign=rf"flash::flash_fwd|cudnn\w*sdpa|efficient_attention|{_SOFTMAX}"
            ),
            ("cpu", "sdpa-flash"): Signature(expected=r"scaled_dot_product_flash_attention", foreign=r"aten::softmax"),
        },
        look=Look(
            colors=("#0072B2", "#56B4E9", "#1F3F77"),
            markers="shd",
            dashes=((0, (4, 1.6)), (0, (2, 1.2)), (0, (3, 1, 1, 1))),
        ),
    )
)

DIS = register(
    Family(
        name="DiS",
        cast=True,
        sizes=("S", "B", "M", "L", "XL", "H"),
        assumed=frozenset({"XL"}),
        build=_build_dis,
        options={BACKEND: ("reference", "mamba-ssm")},
        renamed={"mixer": BACKEND},
        packages={"mamba-ssm": ("mamba_ssm", "causal_conv1d")},
        gpu_only=frozenset({"mamba-ssm"}),
        on_gpu="mamba-ssm",
        operation=_scan_of,
        reference="DiS:reference",
        signatures={("cuda", "mamba-ssm"): Signature(expected=r"selective_scan_fwd")},
        look=Look(
            colors=("#009E73", "#00624A", "#5CCFAE"),
            markers="v8*",
            dashes=((0, (6, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 3))),
        ),
    )
)
