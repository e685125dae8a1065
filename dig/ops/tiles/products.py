"""What there is to choose of the GEMMs that this project computes itself: SwiGLU's, and weights' gradients.

Shapes: D width, F inner width of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dig.ops.tiles.choices import check_positive, check_powers_of_two

ProductPass = Literal["up", "up alone", "down"]
"""Up-projection GEMM with SwiGLU, keeping gate and up or not (``up alone``), and the GEMM back through the
down-projection."""


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """One of SwiGLU's GEMMs, bf16.

    Attributes:
        rows: Tokens of a program, a power of two.
        columns: Of the F columns that a program computes, a power of two.
        depth: Of the sum that it takes at a time, a power of two.
        group: Rows of tiles that are walked together.
        warps: Of a program.
        stages: Steps along the sum whose operands are in shared memory at once.
        registers: Most registers of a thread; None leaves it to the compiler.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}

    def programs(self, M: int, F: int) -> int:
        """How many there are for M tokens and F columns."""
        return -(-M // self.rows) * (F // self.columns)

    def shared_memory(self, which: ProductPass) -> int:
        """Bytes that a program takes at most: its stages' operands, and their barriers. Up has two weights."""
        weights = 1 if which == "down" else 2
        return self.stages * 2 * self.depth * (self.rows + weights * self.columns) + 1024


@dataclass(frozen=True, kw_only=True)
class ProductChoices:
    """SwiGLU's GEMMs with its passes in their epilogues; what is in neither table is a GEMM and a pass apart.

    Attributes:
        narrow_width: The widest D of the first table.
        narrow: Pass → tile choices.
        wide: The same for wider D.
        least_tokens: With fewer, tiles of these sizes leave SMs without work.
        few: Pass → tile choices with fewer tokens, of any width.
        few_programs: Most programs of those; with more, a GEMM and a pass apart do better.
        share: Rows and columns of a weight that the up-projection casts together, where weights are cast in it.
    """

    narrow_width: int
    narrow: Mapping[ProductPass, ProductTiles]
    wide: Mapping[ProductPass, ProductTiles]
    least_tokens: int
    few: Mapping[ProductPass, ProductTiles]
    few_programs: int
    share: tuple[int, int]

    def tiles(self, which: ProductPass, D: int) -> ProductTiles | None:
        """Of a pass over tokens of this width; None where it is done apart."""
        return (self.narrow if self.narrow_width >= D else self.wide).get(which)

    def apart(self) -> ProductChoices:
        """These without any of the tables: every pass is a GEMM and a pass apart."""
        return replace(self, narrow={}, wide={}, few={})


@dataclass(frozen=True, kw_only=True)
class GradientTiles:
    """The gradients of a block's weights in one launch (`dig.ops.weight_gradients`).

    Attributes:
        rows: Of a weight that a program computes, a power of two.
        columns: Likewise.
        depth: Tokens that it takes at a time, a power of two.
        warps: Of a program.
        stages: Steps along the tokens whose operands are in shared memory at once.
        most_width: Of the block, D; wider weights have tiles enough each.
        least_tokens: Of all images; 0: never.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    most_width: int
    least_tokens: int

    def __post_init__(self) -> None:
        check_positive(self, may_be_zero=("least_tokens",))
        check_powers_of_two(self, "rows", "columns", "depth", "warps")

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def programs(self, N: int, K: int) -> int:
        """How many a weight (N, K) takes."""
        return -(-N // self.rows) * (K // self.columns)

    def shared_memory(self) -> int:
        """Bytes that a program takes at most: its stages' operands, and their barriers."""
        return 2 * self.stages * self.depth * (self.rows + self.columns) + 1024
