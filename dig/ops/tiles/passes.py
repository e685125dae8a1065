"""What there is to choose of a block's passes around its kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PassChoices:
    """Which of its ways a pass takes (`dig.raster`, `dig.raster_block`). A limit of 0 tokens: never.

    Attributes:
        beside_tokens: Up to so many tokens of all images, few programs prepare a block's weights beside the block
            before; with more, all do at once. With few tokens the GEMMs leave most SMs idle or short of work; with
            many, cuBLAS' tiles are as many as there are SMs, so that each one taken away costs a GEMM twice its time.
        beside_programs: So many, where weights are cast.
        beside_programs_gates: So many, where gates are all that acts on weights: they are soon done, and more programs
            begin the sooner.
        halved_tokens: Up to so many rows, a wide model without gradients projects q, k, v and gates in two halves of
            the rows.
        unfolded_tokens: Up to so many tokens, one image's gates are not folded into weights that need no cast. Folding
            copies two weights a block, each after that block's modulation. Unfolded, all modulations come in one launch
            before the first block, and nothing runs beside the blocks.
        unfolded_width: Of tokens at least so wide.
        condition_images: Up to so many images, the condition takes two launches (`dig.ops.condition`).
    """

    beside_tokens: int
    beside_programs: int
    beside_programs_gates: int
    halved_tokens: int
    unfolded_tokens: int
    unfolded_width: int
    condition_images: int
