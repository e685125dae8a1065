"""In which order a block sees the tokens of the image grid (paper §3.3, Fig. 4), and how to get from one to another.

Four orders: raster or column-major, each forwards or backwards. SREM flips the sequence after every block and
transposes the grid after every second one, so the orders follow each other with period 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Scan = Literal["causal", "bidirectional", "crisscross"]


class ScanOrder(NamedTuple):
    """An order of the tokens.

    Attributes:
        transposed: Column by column instead of row by row.
        reversed: From the last token to the first.
    """

    transposed: bool
    reversed: bool

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) that the sequence folds into in this order."""
        return grid[::-1] if self.transposed else grid


RASTER = ScanOrder(transposed=False, reversed=False)


@dataclass(frozen=True, kw_only=True)
class Route:
    """How tokens pass through a block.

    Attributes:
        grid: (rows, columns) of the image's tokens.
        source: The order in which they reach it.
        order: The order in which it walks them.
        target: The order in which it hands them on.
    """

    grid: tuple[int, int]
    source: ScanOrder
    order: ScanOrder
    target: ScanOrder


def scan_orders(depth: int, scan: Scan) -> list[ScanOrder]:
    """The order that each of ``depth`` blocks sees.

    ``causal`` is always raster order; ``bidirectional`` flips after every block; ``crisscross`` also transposes after
    every second block (Alg. 1, lines 5-8).
    """
    if scan not in get_args(Scan):
        raise ValueError(f"scan must be one of {', '.join(get_args(Scan))}; got {scan!r}")
    return [
        ScanOrder(
            transposed=scan == "crisscross" and block % 4 >= 2,
            reversed=scan != "causal" and block % 2 == 1,
        )
        for block in range(depth)
    ]


def reorder(x: Tensor, grid: tuple[int, int], source: ScanOrder, target: ScanOrder) -> Tensor:
    """Move tokens from one order to another.

    Args:
        x: (B, T, D) in ``source`` order.
        grid: (rows, columns) of the image, with T = rows·columns.
        source: The order that x is in.
        target: The order wanted.

    Returns:
        (B, T, D) in ``target`` order.
    """
    if source.transposed != target.transposed:
        # Transposing commutes with flipping the whole sequence, so the flip can come after.
        x = x.unflatten(1, source.grid(grid)).transpose(1, 2).flatten(1, 2)
    return x.flip(1) if source.reversed != target.reversed else x
