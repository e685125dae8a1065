"""Tile choices of gated linear attention's kernels, by head widths, dtype and compute capability."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile choices of one head shape.

    Attributes:
        chunk: Tokens of a chunk, 16 times a power of two.
        local_warps: Warps of a program that computes what a chunk adds to the state.
        scan_warps: Warps of a program that scans elements of the state over the chunks.
        scan_lanes: Elements of a program of that.
        scan_groups: Groups of chunks that it scans beside each other, a power of two.
        scan_steps: Chunks of a group, at most; a power of two, as which fewer are counted.
        output_warps: Warps of a program that computes a chunk's outputs.
        output_backward_warps: Warps of a program that goes back through the outputs' norm and gate.
        gradient_warps: Warps of a program that computes a chunk's gradients.
        output_registers: Most registers of a thread of the third of these kernels, where it norms and gates: fewer let
            more programs share a multiprocessor. None leaves it to the compiler.
        output_backward_registers: Those of the fourth.
        gradient_registers: Those of the last.
    """

    chunk: int = 64
    local_warps: int = 4
    scan_warps: int = 4
    scan_lanes: int = 32
    scan_groups: int = 16
    scan_steps: int = 16
    output_warps: int = 4
    output_backward_warps: int = 4
    gradient_warps: int = 4
    output_registers: int | None = None
    output_backward_registers: int | None = None
    gradient_registers: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}")
        if self.chunk < 16 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be 16 times a power of two; got {self.chunk}")


NARROW_BF16 = Tiles()
NARROW_FP32 = Tiles(chunk=16)
WIDE_BF16 = Tiles(chunk=32, local_warps=8, output_warps=8, output_backward_warps=8, gradient_warps=8)
WIDE_FP32 = Tiles(chunk=16, local_warps=8, output_warps=8, output_backward_warps=8, gradient_warps=8)
INTERPRETER_TILES = Tiles(scan_lanes=128, scan_groups=2)
"""Fewer and larger programs: the interpreter takes the same time for each, whatever its width."""
TILES: dict[int, dict[tuple[int, int, torch.dtype], Tiles]] = {
    9: {
        (32, 64, torch.bfloat16): NARROW_BF16,
        (36, 72, torch.bfloat16): WIDE_BF16,
        (32, 64, torch.float32): NARROW_FP32,
        (36, 72, torch.float32): WIDE_FP32,
    }
}
"""Major compute capability of an NVIDIA GPU → (K, V, dtype) → tile choices, the narrowest heads first: see `choose`.

A table, not autotuning: the first call costs no search, and a run repeats exactly. The first entry is the best of
``python -m bench ops gla --sweep`` on an H100 that was also the best in a whole model, whose tensors are not in the L2
cache. The others are the largest chunks at which no kernel keeps registers in memory: where one does while it uses
Hopper's asynchronous matrix products, compiled code has been seen to read their operands from wrong addresses
(``python -m bench ops registers`` compiles all of them and looks, without a GPU)."""


def choose(K: int, V: int, dtype: torch.dtype, capability: int) -> Tiles:
    """The first entry of a GPU's table for heads at least as wide, or the widest; other GPUs take Hopper's."""
    entries = {(k, v): tiles for (k, v, of), tiles in TILES.get(capability, TILES[9]).items() if of == dtype}
    return next((tiles for (k, v), tiles in entries.items() if k >= K and v >= V), list(entries.values())[-1])


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    """The tile choices for queries (B, T, H, K) and values (B, T, H, V), fp32 or bf16."""
    if v.device.type == "cpu":
        return INTERPRETER_TILES
    # As plain numbers: with dynamic shapes torch.compile counts in symbols, which no table can look up.
    K, V = int(q.shape[-1]), int(v.shape[-1])
    return choose(K, V, v.dtype, torch.cuda.get_device_capability(v.device)[0])
