"""Launches of gated linear attention's kernels, one a function, and what they share: the plan and the decay gate.

`dig.ops.gla.block_launches` puts those of a whole block in order.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks.

States between chunks are stored in the inputs' dtype: they are operands of a product in that dtype anyway, and in bf16
that halves their traffic. The scan over chunks carries its state in fp32, so the rounding does not add up along the
sequence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dig.ops.gla.kernels import local_state_kernel, output_kernel, scan_kernel, short_scan_kernel
from dig.ops.gla.kernels_backward import column_sums_kernel, gradient_kernel
from dig.ops.launch import LaunchContext
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import GlaTiles
from dig.ops.whole import ceil_div, power_of_two


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a call that several launches share."""

    tiles: GlaTiles
    B: int
    T: int
    H: int
    N: int
    scale: float
    inverse_normalizer: float
    scan: tuple[int, int, int]
    """(rows, columns) of the image, for orders that go column by column, and the order, as `scan_tokens` takes them."""
    constants: dict[str, Any]
    """Those of every kernel that works on a chunk."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: one a chunk and head."""
        # Heads vary fastest: programs that run together read neighbouring parts of the same tokens.
        return self.H, self.N, self.B

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(B, H, N, K, V)."""
        return self.B, self.H, self.N, self.constants["K"], self.constants["V"]

    @property
    def walks(self) -> bool:
        """Whether the forward pass is one launch, whose programs walk all chunks of a head, instead of three.

        One launch moves the fewest bytes, but its programs walk chunks one after the other; three launches do all
        chunks at once. So one launch needs enough heads to keep the card busy, and the more, the more chunks there are.
        Of a single chunk both ways have the same programs.
        """
        tiles = self.tiles
        few_chunks, many_heads = tiles.walk_chunks >= self.N, tiles.walk_programs * self.N <= self.B * self.H
        return few_chunks and (many_heads or self.N == 1)

    @property
    def levels(self) -> int:
        """Group sizes in a chunk: 16, 32, ... up to the chunk."""
        return self.tiles.chunk.bit_length() - 4


def tiles_for(q: Tensor, v: Tensor) -> GlaTiles:
    """The tile choices for queries (B, T, H, K) and values (B, T, H, V), fp32 or bf16."""
    # Plain numbers: a table has no entry for torch.compile's symbols, which dynamic shapes have.
    return for_device(v.device).gla_tiles(int(q.shape[-1]), int(v.shape[-1]), v.dtype)


def plan_of(
    q: Tensor,
    v: Tensor,
    scale: float,
    normalizer: float,
    grid: tuple[int, int] = (0, 0),
    order: int = 0,
    *,
    alone: bool = False,
) -> Plan:
    """The launch plan for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Not read.
        v: Not read.
        scale: As of `Plan`.
        normalizer: The inverse of its own.
        grid: As of its scan.
        order: As `scan_tokens` takes it.
        alone: Of a forward pass that no backward pass follows. With few programs it has tiles of its own.
    """
    B, T, H, K = q.shape
    tiles = tiles_for(q, v)
    if alone:
        tiles = tiles.of(B, T, H)
    # torch.compile's symbols, which dynamic shapes have, are no keys of a cache.
    plan = _plan if type(B) is int and type(T) is int else _plan.__wrapped__
    return plan(tiles, B, T, H, K, v.shape[-1], v.dtype, scale, normalizer, grid, order)


@functools.lru_cache(maxsize=1024)
def _plan(
    tiles: GlaTiles,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    scale: float,
    normalizer: float,
    grid: tuple[int, int],
    order: int,
) -> Plan:
    constants = {
        "K": K,
        "V": V,
        "KP": max(16, power_of_two(K)),
        "VP": max(16, power_of_two(V)),
        "C": tiles.chunk,
        "PRECISION": _precision(dtype),
    }
    N = ceil_div(T, tiles.chunk)
    return Plan(
        tiles=tiles,
        B=B,
        T=T,
        H=H,
        N=N,
        scale=scale,
        inverse_normalizer=1.0 / normalizer,
        scan=(*grid, order),
        constants=constants,
    )


def _precision(dtype: torch.dtype) -> str:
    if not isinstance(output_kernel, triton.runtime.JITFunction):
        return "interpreter"
    # Three tf32 products keep fp32's 24 bits of the operands and still run on the tensor cores.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head of each, one after the other."""
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += tensor.stride()[:3]
    return strides


@dataclass(frozen=True, kw_only=True)
class DecayGate:
    """What the decays of a call come from.

    Attributes:
        values: Log decays or gate logits (B, T, H, K), or with weight and bias the low-rank factor (B, T, R) of the
            logits, from which the kernels compute them: at rank 16 that takes less than reading them.
        logits: Whether the log decays are still to be computed.
        weight: (H K, R), with values (B, T, R) only.
        bias: (H K,), likewise.
    """

    values: Tensor
    logits: bool
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels take them; a pointer that a kernel does not touch can be anything."""
        if self.weight is None or self.bias is None:
            return self.values, self.values, self.values
        return self.values, self.weight, self.bias

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, token and head."""
        batch, token, head, *_ = self.values.stride()
        return batch, token, head if self.weight is None else 0

    @property
    def constants(self) -> dict[str, Any]:
        """R is 0 without a weight."""
        rank = 0 if self.weight is None else self.weight.shape[1]
        return {"R": rank, "RP": max(16, power_of_two(rank)), "LOGITS": self.logits}


def local_states(
    launch: LaunchContext,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: DecayGate,
    *,
    do: Tensor | None = None,
    sums_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk adds to the state (1, B, H, N, K, V), the sums of the decays, and do . v of each token.

    With do, the first is (2, ...), and its second part what each chunk adds to the state's gradient; without, the last
    is left unwritten. With ``sums_only`` the first has no entries.
    """
    entries = 0 if sums_only else 1 if do is None else 2
    states = torch.empty(entries, *plan.state_shape, dtype=v.dtype, device=v.device)
    sums = empty_sums(plan, v)
    own = torch.empty(plan.B, plan.T, plan.H, dtype=torch.float32, device=v.device)
    do_or_v = v if do is None else do
    launch.early(
        local_state_kernel, plan.grid, (q, k, v, *gate.tensors, do_or_v, sums, states, own),
        (*strides_of(q, k, v), *gate.strides, *strides_of(do_or_v),
         plan.T, plan.N, *plan.scan, plan.scale, plan.inverse_normalizer),
        **plan.constants, **gate.constants, STATES=not sums_only, GRADIENT=do is not None,
        num_warps=plan.tiles.local_warps,
    )  # fmt: skip
    return states, sums, own


def decay_sums(launch: LaunchContext, plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate: DecayGate) -> Tensor:
    """The sums of the decays alone, as the kernels of the backward pass read them again; q, k and v aren't read."""
    return local_states(launch, plan, q, k, v, gate, sums_only=True)[1]


def empty_sums(plan: Plan, v: Tensor) -> Tensor:
    """Room for the sums of the decays of every chunk's tokens (B, H, N C, KP) in fp32."""
    rows, columns = plan.N * plan.tiles.chunk, plan.constants["KP"]
    return torch.empty(plan.B, plan.H, rows, columns, dtype=torch.float32, device=v.device)


def scan_states(launch: LaunchContext, plan: Plan, states: Tensor, sums: Tensor, *, direction: int) -> None:
    """Turn what chunks add into what was added before each, in place; directions as `scan_kernel` takes them."""
    (K, V), tiles = states.shape[-2:], plan.tiles
    kernel: Any
    if tiles.short_chunks >= plan.N:
        sizes = short_scan_sizes(tiles, plan.N, V, states.dtype)
        kernel, warps, parts = short_scan_kernel, tiles.short_warps, ceil_div(K * V, sizes["WIDTH"] * sizes["UNITS"])
    else:
        sizes = scan_sizes(tiles, plan.N, V, states.dtype)
        kernel, warps, parts = scan_kernel, tiles.scan_warps, ceil_div(V, sizes["LANES"]) * K
    launch.early(
        kernel, (parts, plan.B * plan.H, states.shape[0]), (states, sums), (plan.N, direction),
        K=K, V=V, KP=plan.constants["KP"], C=tiles.chunk, **sizes, num_warps=warps,
    )  # fmt: skip


def scan_sizes(tiles: GlaTiles, N: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """`scan_kernel`'s for N chunks."""
    # A power of two, so that images of all sizes share a few binaries.
    steps = min(tiles.scan_steps, power_of_two(ceil_div(N, tiles.scan_groups)))
    return {"LANES": min(tiles.scan_lanes, power_of_two(V)), "GROUPS": tiles.scan_groups, "STEPS": steps}


def short_scan_sizes(tiles: GlaTiles, N: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """`short_scan_kernel`'s for N chunks: units of 16 bytes, or of what divides a row."""
    steps = min(tiles.short_steps, power_of_two(N))
    return {"WIDTH": math.gcd(V, 16 // dtype.itemsize), "UNITS": tiles.short_units, "STEPS": steps}


def walk_rounds(tiles: GlaTiles, N: int) -> int:
    """`walk_kernel`'s rounds for N chunks: a power of two, so that images of all sizes share a few binaries."""
    return power_of_two(N) * tiles.chunk // 16


def gradients_of(
    launch: LaunchContext,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: DecayGate,
    do: Tensor,
    sums: Tensor,
    states: Tensor,
    state_gradients: Tensor,
    own: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Write the gradients of q, k, v and the gate (B, T, H, K) into ``outputs``, whose heads lie packed in each token.

    Returns:
        Every chunk's part of the gradient of the gate's bias (B N, H K); of no rows without a bias.
    """
    rows = 0 if gate.bias is None else plan.B * plan.N
    dbias = torch.empty(rows, plan.H * q.shape[-1], dtype=torch.float32, device=q.device)
    launch.early(
        gradient_kernel, plan.grid,
        (q, k, v, *gate.tensors, do, sums, states, state_gradients, own, *outputs, dbias),
        (*strides_of(q, k, v), *gate.strides, *strides_of(do), *(output.stride(1) for output in outputs),
         plan.T, plan.N, *plan.scan, plan.scale, plan.inverse_normalizer),
        **plan.constants, **gate.constants, LEVELS=plan.levels, num_warps=plan.tiles.gradient_warps,
        maxnreg=plan.tiles.gradient_registers,
    )  # fmt: skip
    return dbias


def empty_states(q: Tensor, v: Tensor) -> Tensor:
    """Room for the states of a call with queries (B, T, H, K) and values (B, T, H, V): (1, B, H, N, K, V)."""
    B, T, H, K = q.shape
    N = -(-T // tiles_for(q, v).chunk)
    return torch.empty(1, B, H, N, K, v.shape[-1], dtype=v.dtype, device=v.device)


def no_states(v: Tensor) -> Tensor:
    """What stands for the states of values v (B, T, H, V) where nothing is kept for a backward pass."""
    return v.new_empty(0, *v.shape)


def check_kept(keep: bool) -> None:
    """Refuse to differentiate a forward pass that wasn't to keep its states.

    Raises:
        ValueError: It wasn't.
    """
    if not keep:
        raise ValueError("keep must be True where gradients are recorded: the backward pass reads the states")


def column_sums(launch: LaunchContext, tiles: GlaTiles, partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (D,) in ``dtype`` over the rows of partials (rows, D), which are at least one."""
    rows, D = partials.shape
    sums = torch.empty(D, dtype=dtype, device=partials.device)
    launch(
        column_sums_kernel, (ceil_div(D, tiles.sum_columns),), (partials, sums), (rows,),
        D=D, ROWS=tiles.sum_rows, COLS=tiles.sum_columns, num_warps=tiles.sum_warps,
    )  # fmt: skip
    return sums
