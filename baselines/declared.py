"""What DiT, Flash-DiT and DiS say of themselves to `dig.registry`. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dig.family import BACKEND, Family, Look, Signature
from dig.registry import register

if TYPE_CHECKING:
    from dig.layers import Backbone

# Names as the profiler gives them: cuDNN's say cudnn_generated_fort_native_sdpa_sm90_flash_fprop_..., flash-attn's
# flash::flash_fwd_kernel<...>, PyTorch's copy of the latter pytorch_flash::flash_fwd_kernel<...>.
_FUSED_ATTENTION = r"flash_fwd|fmha|cudnn\w*(sdpa|flash|mha)|efficient_attention|scaled_dot_product_\w*flash"
_SOFTMAX = r"(?i:softmax)"


def _build_dit(size: str, **fields: Any) -> Backbone:
    from baselines.dit import SIZES, DiT, DiTConfig

    depth, width, heads = SIZES[size]
    return DiT(DiTConfig(depth=depth, width=width, heads=heads, **fields))


def _build_dis(size: str, **fields: Any) -> Backbone:
    from baselines.dis import SIZES, DiS, DiSConfig

    depth, width = SIZES[size]
    return DiS(DiSConfig(depth=depth, width=width, **fields))


# Hues of Okabe and Ito's palette, which colour-blind readers can tell apart, each in three shades.
DIT = register(
    Family(
        name="DiT",
        sizes=("S", "B", "L", "XL"),
        build=_build_dit,
        options={BACKEND: ("materialized",)},
        renamed={"attention": BACKEND},
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
        sizes=("S", "B", "L", "XL"),
        build=_build_dit,
        options={BACKEND: ("sdpa-flash", "sdpa-cudnn", "flash-attn")},
        renamed={"attention": BACKEND},
        packages={"flash-attn": ("flash_attn",)},
        gpu_only=frozenset({"sdpa-cudnn", "flash-attn"}),
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
        sizes=("S", "B", "M", "L", "XL", "H"),
        assumed=frozenset({"XL"}),
        build=_build_dis,
        options={BACKEND: ("reference", "mamba-ssm")},
        renamed={"mixer": BACKEND},
        packages={"mamba-ssm": ("mamba_ssm", "causal_conv1d")},
        gpu_only=frozenset({"mamba-ssm"}),
        on_gpu="mamba-ssm",
        reference="DiS:reference",
        signatures={("cuda", "mamba-ssm"): Signature(expected=r"selective_scan_fwd")},
        look=Look(
            colors=("#009E73", "#00624A", "#5CCFAE"),
            markers="v8*",
            dashes=((0, (6, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 3))),
        ),
    )
)
