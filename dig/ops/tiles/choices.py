"""What there is to choose of every operation's kernels: one frozen class an operation.

A program is what CUDA calls a block (CTA), a warp 32 threads. Shapes as in each operation's package. Numbers have no
defaults here: each stands in an architecture's file, with how it was found. None alone is one, for what is off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from dig.ops.whole import power_of_two

SremPass = Literal["forward", "backward"]


def check_positive(choices: Any, *, may_be_zero: Collection[str] = ()) -> None:
    """Raise ValueError unless every number of these choices is at least 1, or 0 where it may be."""
    for each in fields(choices):
        value, least = getattr(choices, each.name), int(each.name not in may_be_zero)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ValueError(f"{each.name} must be at least {least}; got {value}")


def check_powers_of_two(choices: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is a power of two."""
    for name in names:
        value = getattr(choices, name)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} must be a power of two; got {value}")


def _padded(width: int) -> int:
    """As the recurrence's kernels pad a head: to a power of two, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class GlaTiles:
    """Gated linear attention, heads of one shape and dtype.

    Attributes:
        chunk: Tokens of a chunk, 16 times a power of two.
        few: The choices where `few_programs` or fewer programs take a chunk of a head each; None: these.
        few_programs: With so few, SMs are idle, and a program's own work is what all wait for: the less, the better.
        local_warps: Warps of a program that computes what a chunk adds to the state.
        scan_warps: Warps of a program that scans elements of the state over the chunks.
        scan_lanes: Elements of a program of that.
        scan_groups: Groups of chunks that it scans beside each other, a power of two.
        scan_steps: Chunks of a group, at most; a power of two, as which fewer are counted.
        short_chunks: Up to so many chunks a program walks all of them with a large part of the state; 0 if never.
        short_warps: Warps of such a program.
        short_units: Its part of the state, in units of up to 16 bytes; a power of two.
        short_steps: Chunks that it loads at once, at most; a power of two, as which fewer are counted.
        walk_chunks: Up to so many chunks the forward pass may be one launch, whose programs walk all chunks of a head;
            0 if never.
        walk_programs: Such programs for each of a head's chunks at least, beside which there are three launches: the
            more steps a program walks one after the other, the more of them are to share an SM.
        segment_chunks: Chunks of a segment, where a head has more chunks and the forward pass walks its segments beside
            each other (`dig.ops.gla.kernels_walk`), a power of two; 0: three launches take a chunk a program.
        segment_programs: Such programs at least, beside which there are those three launches.
        segment_warps: Warps of a program that computes what a segment adds to the state.
        walk_warps: Warps of such a program.
        walk_registers: Most registers of its threads, as below, where it computes decays from their low-rank factor.
        output_warps: Warps of a program that computes a chunk's outputs.
        output_backward_warps: Warps of a program that goes back through the outputs' norm and gate.
        gradient_warps: Warps of a program that computes a chunk's gradients.
        output_backward_parts: Whether the fourth of these kernels takes the values' columns in two parts.
        gradient_rounds: Whether the last one takes one pair of operands for all products
            (`dig.ops.gla.kernels_rounds`, both).
        gradient_scan_chunks: Up to so many chunks it then adds up the gradients of the states itself, for which there
            is a launch else; 0 if never.
        output_registers: Most registers of a thread of the third of these kernels, where it norms and gates: fewer let
            more programs share an SM. None leaves it to the compiler.
        output_backward_registers: Those of the fourth.
        gradient_registers: Those of the last; of its rounds, where decays come from their low-rank factor or a scan
            comes before.
        sum_rows: Rows of partial sums that a program adds up at a time.
        sum_columns: Its columns.
        sum_warps: Its warps.
    """

    chunk: int
    few: GlaTiles | None = None
    few_programs: int
    local_warps: int
    scan_warps: int
    scan_lanes: int
    scan_groups: int
    scan_steps: int
    short_chunks: int
    short_warps: int
    short_units: int
    short_steps: int
    walk_chunks: int
    walk_programs: int
    segment_chunks: int
    segment_programs: int
    segment_warps: int
    walk_warps: int
    walk_registers: int | None = None
    output_warps: int
    output_backward_warps: int
    gradient_warps: int
    output_backward_parts: bool = False
    gradient_rounds: bool = False
    gradient_scan_chunks: int
    output_registers: int | None = None
    output_backward_registers: int | None = None
    gradient_registers: int | None = None
    sum_rows: int
    sum_columns: int
    sum_warps: int

    def __post_init__(self) -> None:
        may_be_zero = ("short_chunks", "walk_chunks", "walk_programs", "segment_chunks", "segment_programs")
        check_positive(self, may_be_zero=(*may_be_zero, "gradient_scan_chunks"))
        check_powers_of_two(self, "short_units", "short_steps", *(["segment_chunks"] if self.segment_chunks else []))
        if self.chunk < 16 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be 16 times a power of two; got {self.chunk}")

    def of(self, B: int, T: int, H: int) -> GlaTiles:
        """The choices for T tokens of so many images and heads."""
        return self.few if self.few is not None and B * H * -(-T // self.chunk) <= self.few_programs else self

    def shared_memory(self, K: int, V: int, dtype: torch.dtype) -> int:
        """Bytes that a program takes at most: a state, and a chunk's rows of q, k, v and the output's gradient.

        A bound, by which `Architecture` takes smaller chunks. The compile check (`bench.ops.registers`) holds the
        compiler to it on every architecture.
        """
        # Rounds keep two states more there, and scores on the way between two layouts.
        rounds = 2 * (_padded(K) * _padded(V) + self.chunk * self.chunk) if self.gradient_rounds else 0
        return self._forward_memory(K, V, dtype) + dtype.itemsize * rounds

    def walk_shared_memory(self, K: int, V: int, dtype: torch.dtype) -> int:
        """The same of a program that walks a head's chunks: as forwards, and its state on the way between two layouts.

        Where that is too much, `Architecture` takes three launches.
        """
        return self._forward_memory(K, V, dtype) + dtype.itemsize * _padded(K) * _padded(V)

    def _forward_memory(self, K: int, V: int, dtype: torch.dtype) -> int:
        K, V = _padded(K), _padded(V)
        return dtype.itemsize * (K * V + 2 * self.chunk * (K + V))


@dataclass(frozen=True, kw_only=True)
class NormTiles:
    """Adaptive norm, rows of one width and dtype.

    Attributes:
        rows: Rows of a program of the forward kernel.
        part: Widest part that it cuts a row into, a power of two. A warp reads 256 columns of bf16 or 128 of fp32 in
            one go, 16 bytes a thread; with parts of that width and as many warps as rows, sums along a row stay within
            a warp.
        warps: Its warps.
        backward_rows: Rows that a program of the backward kernel holds at once, of the many that it walks over.
        backward_part: Widest part there. The sums over tokens take registers for every column that a thread has, so
            that wide rows are spread over several warps.
        backward_warps: Its warps.
        programs: About how many programs the backward kernel runs on. Each leaves a row of partial sums, which is to
            be little beside the rows that it reads, and an SM is to hold its share of them at once.
        branch_programs: The same where it goes back through a gated branch too, whose sums take more registers.
        sum_rows: Rows of partial sums that a program of the last kernel adds up at a time.
        sum_columns: Its columns.
        sum_least_rows: Where an image has fewer partial sums, it takes fewer rows, at least so many, and as many more
            columns.
        sum_warps: Its warps.
    """

    rows: int
    part: int
    warps: int
    backward_rows: int
    backward_part: int
    backward_warps: int
    programs: int
    branch_programs: int
    sum_rows: int
    sum_columns: int
    sum_least_rows: int
    sum_warps: int

    def __post_init__(self) -> None:
        check_positive(self)
        check_powers_of_two(self, *(each.name for each in fields(self) if not each.name.endswith("programs")))

    def sums(self, partials: int) -> dict[str, Any]:
        """The last kernel's sizes for so many rows of partial sums an image."""
        rows = min(self.sum_rows, max(self.sum_least_rows, power_of_two(partials)))
        # Those of all images are many even where each has few.
        return {
            "ROWS": rows,
            "ALL_ROWS": min(2 * rows, self.sum_rows),
            "COLS": self.sum_columns * self.sum_rows // rows,
        }


@dataclass(frozen=True, kw_only=True)
class SremTiles:
    """SREM's convolution, one pass and dtype.

    Attributes:
        channels: Channels of a program, a power of two.
        groups: Groups of columns side by side, a power of two.
        width: Columns of a group, computed by the same thread: a token is loaded (width + 2) / width times.
        rows: Rows that a program walks at most.
        least_rows: Rows that it walks at least, where the grid has them: a patch also reads those next to it.
        programs: Patches are as short as leaves at most this many programs: the SMs times the programs that each holds
            at once, so that none begins when the others end.
        warps: Warps of a program. A thread holds channels · groups / (32 · warps) channels, which must be 2 or more:
            bf16 is computed in pairs.
        registers: Most registers of a thread; None leaves it to the compiler.
        sum_steps: Patches that a program of the second backward kernel adds up at once.
        sum_channels: Its channels.
        sum_warps: Its warps.
    """

    channels: int
    groups: int
    width: int
    rows: int
    least_rows: int
    programs: int
    warps: int
    registers: int | None = None
    sum_steps: int
    sum_channels: int
    sum_warps: int

    def __post_init__(self) -> None:
        check_positive(self)
        check_powers_of_two(self, "channels", "groups")
        if 64 * self.warps > self.channels * self.groups:
            raise ValueError(f"warps must be at most channels · groups / 64; got {self.warps}")


@dataclass(frozen=True, kw_only=True)
class SwigluTiles:
    """SwiGLU by itself, one dtype.

    Attributes:
        elements: Elements of a program, a power of two; rows times columns.
        columns: The most columns of a program, a power of two.
        warps: Its warps.
    """

    elements: int
    columns: int
    warps: int

    def __post_init__(self) -> None:
        check_powers_of_two(self, "elements", "columns", "warps")


@dataclass(frozen=True, kw_only=True)
class VectorTiles:
    """A product of a matrix and a vector.

    Attributes:
        rows: Rows of a program.
        columns: Columns that it multiplies at a time, at most.
        warps: Its warps.
    """

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class CopyTiles:
    """A cast of weights.

    Attributes:
        elements: That a program copies at a time.
        warps: Its warps.
    """

    elements: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class ModulationTiles:
    """adaLN's linear layer for a batch: `dig.ops.modulation`.

    Attributes:
        rows: Of the weight, of a program of the forward kernel.
        columns: Of the weight, that it multiplies at a time.
        images: Of a program, at most; a power of two, at least 16.
        inner_images: That the weight's gradient adds up at a time, at most; likewise.
        gradient_rows: Of a program of the weight's gradient.
        gradient_columns: Of a program of either gradient.
        shares: Among so many programs the rows of the weight are split for the condition's gradient.
        share_rows: Rows that one of them multiplies at a time.
        warps: Of a program.
        stages: Loads in flight.
    """

    rows: int
    columns: int
    images: int
    inner_images: int
    gradient_rows: int
    gradient_columns: int
    shares: int
    share_rows: int
    warps: int
    stages: int

    def shared_memory(self) -> int:
        """Bytes that a program takes at most: factors in fp32, and barriers. `Architecture` takes fewer stages by it.

        Both factors of a step for each load in flight, and of one step the second factor once more: a tf32x3 product
        splits each into two parts, and Triton 3.8 keeps that of the second in shared memory.
        """
        steps = (  # the first factor's elements, the second's
            (self.rows * self.columns, self.images * self.columns),
            (self.inner_images * self.gradient_rows, self.inner_images * self.gradient_columns),
            (self.share_rows * self.images, self.share_rows * self.gradient_columns),
        )
        return 4 * max(self.stages * (first + second) + second for first, second in steps) + 1024


@dataclass(frozen=True, kw_only=True)
class WeightTiles:
    """Casts of weights, matrix-vector products, and gradients of gated weights.

    Attributes:
        copy: Where all programs start at once.
        copy_few: Where at most ``few`` programs run beside other kernels, each with an SM to itself.
        vector: As ``copy``.
        vector_few: As ``copy_few``.
        few: Most programs that count as few.
        gradient_columns: Columns that a program of the gradients' kernel takes at a time, at most.
        gradient_warps: Its warps.
        modulation: Of adaLN's linear layer for a batch.
    """

    copy: CopyTiles
    copy_few: CopyTiles
    vector: VectorTiles
    vector_few: VectorTiles
    few: int
    gradient_columns: int
    gradient_warps: int
    modulation: ModulationTiles

    def copy_for(self, programs: int | None) -> CopyTiles:
        """For at most so many programs; None: as many as there are blocks."""
        return self.copy_few if self._few(programs) else self.copy

    def vector_for(self, programs: int | None) -> VectorTiles:
        """For at most so many programs; None: as many as there are blocks."""
        return self.vector_few if self._few(programs) else self.vector

    def _few(self, programs: int | None) -> bool:
        return programs is not None and programs <= self.few
