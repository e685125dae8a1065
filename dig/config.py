"""What defines a DiG: `DiGConfig`, the published sizes, and the words that its fields take. No torch here.

Shapes: B batch, T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dig.scan import Scan

Variant = Literal["paper", "release"]
Convolution = Literal["none", "default-init", "identity-init"]
Skip = Literal["none", "linear", "identity-init"]
SkipOrder = Literal["released", "aligned"]
Backend = Literal["reference", "fla", "triton"]

EPS = 1e-6

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Size → (depth N, width D, heads), Tab. 1 of the paper."""
RELEASE_XL_HEADS = 18
"""The authors' code gives XL 18 heads (K 32, V 64) where Tab. 1 says 16 (K 36, V 72)."""


@dataclass(frozen=True, kw_only=True)
class DiGConfig:
    """Everything that defines a DiG.

    Attributes:
        input_size: (height, width) of the latent, or of the image in pixel space.
        in_channels: Channels of the input; 4 for the latents of the Stable Diffusion VAE.
        num_classes: Labels.
        patch_size: Side P of a patch.
        depth: Blocks N.
        width: D.
        heads: H; keys have D/2/H values a head, values D/H.
        variant: ``paper`` (RMSNorm with weight before each half of a block) or ``release`` (LayerNorm without).
        scan: Orders of the blocks; every one but ``crisscross`` is an ablation of Tab. 2.
        convolution: SREM's 3×3 convolution: none, PyTorch's default initialisation, or the identity (Tab. 2).
        skip: Long skips from the first half's blocks to the second's (the U shape of the paper's CVPR version): a
            linear layer over a block's tokens beside the kept ones, initialised as any other (``linear``, the authors'
            ``-skip``) or so that it hands on the block's own tokens (``identity-init``, their ``-skipzero``).
        skip_order: How kept tokens meet those of the block that reads them. ``released`` joins them one by one as
            they lie, as the authors' code does: every other skip then joins tokens of different places, for one of
            the two sequences goes by rows and the other by columns. ``aligned`` joins tokens of the same place.
        backend: What runs the model. ``reference`` is PyTorch on any device. ``fla`` takes flash-linear-attention's
            recurrence, norm·gate and SwiGLU, which is what the published model runs on. ``triton`` is this project's
            kernels, for everything between the matrix products (`dig.raster`).
        label_dropout: Share of the labels replaced by the null label in training.
    """

    input_size: tuple[int, int]
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int = 2
    depth: int
    width: int
    heads: int
    variant: Variant = "paper"
    scan: Scan = "crisscross"
    convolution: Convolution = "identity-init"
    skip: Skip = "none"
    skip_order: SkipOrder = "released"
    backend: Backend = "reference"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no DiG can have."""
        for name, kind in (
            ("variant", Variant),
            ("scan", Scan),
            ("convolution", Convolution),
            ("skip", Skip),
            ("skip_order", SkipOrder),
            ("backend", Backend),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1; got {self.depth}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads; got {self.width} and {self.heads}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1); got {self.label_dropout}")

    @property
    def ffn_width(self) -> int:
        """Inner width of SwiGLU: 8D/3, rounded up to a multiple of 256."""
        return -(-8 * self.width // (3 * 256)) * 256

    def skip_source(self, block: int) -> int | None:
        """The block whose tokens this one reads through its skip: its mirror image; None where it has no skip.

        Of N blocks the last ⌊N/2⌋ - 1 read one, the last block from the first.
        """
        source = self.depth - 1 - block
        return source if self.skip != "none" and source < self.depth // 2 - 1 else None


def heads_of(size: str, variant: Variant) -> int:
    """Heads of a published size, which differ between the variants at XL."""
    return RELEASE_XL_HEADS if size == "XL" and variant == "release" else SIZES[size][2]
