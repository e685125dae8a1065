"""The least work of an operation, FLOPs and bytes, from its name and its arguments' shapes.

Both are lower bounds: every input read once, the output of known operations written once; views move nothing. A share
of the roofline from them is too low where an operation must do more. It would be too high only where a cache is faster
than the ceilings; there it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ITEM_BYTES = {
    "float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "long int": 8, "int": 4, "bool": 1, "unsigned char": 1,
}  # fmt: skip

LIST_BYTES = {"dig::prepare_weights": 6.0}
"""Of operators on lists of tensors, whose dtypes the profiler does not tell, bytes for each element of the first list:
fp32 weights, copied to bf16.
"""
PARTLY_READ = frozenset({
    "dig::gla_mixer_sums",
    "aten::embedding", "aten::index", "aten::index_select", "aten::gather", "aten::take", "aten::masked_select",
    "aten::index_put_", "aten::_index_put_impl_", "aten::scatter_", "aten::scatter_add_", "aten::index_add_",
    "aten::item", "aten::_local_scalar_dense",
})  # fmt: skip
"""Operators that read or write a part of their tensors: what they move at least, shapes alone don't say."""
VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "t", "transpose", "permute", "movedim", "numpy_T", "view", "_unsafe_view", "_reshape_alias", "reshape",
        "view_as", "view_as_real", "view_as_complex", "flatten", "unflatten", "expand", "expand_as", "broadcast_to",
        "as_strided", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unsqueeze",
        "squeeze", "alias", "detach", "detach_", "lift_fresh", "unfold", "diagonal", "real", "imag", "result_type",
        "empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "size", "stride", "is_nonzero",
    )
)  # fmt: skip
"""Operators that move nothing: they give the same memory another shape, or memory that nobody wrote. Those that do copy
(``reshape``, where it must) call an operator that is counted.
"""
MOST_SHARE = 1.1
"""Of a roofline. What is faster than the ceilings by more than they are known to had its data in a cache, and no share
of them says anything about it."""

Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs (two a multiply-add) and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def least_us(self, flop_rate: float, byte_rate: float) -> float:
        """Microseconds that a machine with these rates (each per second) needs at least."""
        return 1e6 * max(self.flops / flop_rate, self.bytes / byte_rate)

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


def _products(name: str, shapes: Sequence[Shape]) -> tuple[float, float]:
    """FLOPs and output elements of a GEMM or an attention; zeros for anything else."""
    matrices = [s for s in shapes if len(s) >= 2]
    if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm") and len(matrices) >= 2:
        a, b = matrices[-2:]
        output = math.prod(a[:-1]) * b[-1]
        return 2.0 * output * a[-1], output
    if name in ("dig::project_up", "dig::project_up_preparing") and len(matrices) >= 2:
        # x (B, T, D) and weight (2F, D) to hidden (B, T, F).
        x, weight = matrices[:2]
        return 2.0 * math.prod(x) * weight[0], math.prod(x[:-1]) * weight[0] / 2
    if name == "dig::project_down_backward" and len(matrices) >= 3:
        # dout (B, T, D), weight (D, F) and gate_up (B, T, 2F) to the gradient of gate_up, and hidden (B, T, F).
        dout, weight = matrices[:2]
        return 2.0 * math.prod(dout) * weight[1], 3.0 * math.prod(dout[:-1]) * weight[1]
    if "scaled_dot_product" in name and "attention" in name:
        heads = [s for s in shapes if len(s) == 4]
        backward = "backward" in name
        # Forwards q, k, v; backwards the output's gradient first. (B, H, T, K) each.
        if len(heads) >= 3 + backward:
            q, k, v = heads[backward : 3 + backward]
            pairs = math.prod(q[:3]) * k[2]
            forward = 2.0 * pairs * (q[3] + v[3])
            return (2.5 if backward else 1.0) * forward, math.prod(q[:3]) * (v[3] if not backward else 3 * q[3])
    return 0.0, 0.0


def cost_of(name: str, shapes: Sequence[Shape], types: Sequence[str]) -> Cost:
    """The least cost of one call of an operator.

    Args:
        name: As the dispatcher calls it: ``aten::mm``.
        shapes: Of its tensor arguments, lists of them for lists of tensors; empty for other arguments.
        types: Of its arguments, as the profiler names them: ``float``, ``c10::BFloat16``.
    """
    if name in PARTLY_READ or name in VIEWS:
        return Cost()
    if name in LIST_BYTES and shapes:
        elements = sum(math.prod(s) for s in shapes[0] if isinstance(s, Sequence))
        return Cost(bytes=LIST_BYTES[name] * elements)
    tensors = [(s, ITEM_BYTES[t]) for s, t in zip(shapes, types, strict=False) if s and t in ITEM_BYTES]
    read = sum(math.prod(s) * size for s, size in tensors)
    flops, output = _products(name, [s for s, _ in tensors])
    return Cost(flops=flops, bytes=read + output * (tensors[0][1] if tensors else 0))


def kernel_costs(name: str, shapes: Sequence[Shape], types: Sequence[str]) -> dict[str, Cost]:
    """The least cost of each kernel, by name, of an operator whose kernels share its work; empty for others.

    DiG's recurrence with its decays, norm and output gate (`dig.ops.gla.mixer`): slices of the projection's output that
    a kernel reads, what it writes; in the backward pass also the states between chunks and the decays' sums.
    """
    if name not in ("dig::gla_mixer", "dig::gla_mixer_backward") or len(shapes) < 2:
        return {}
    (batch, tokens, width), (keys, rank) = shapes[:2]
    values = (width - rank - 2 * keys) / 2
    element = ITEM_BYTES.get(types[0], 2) * batch * tokens
    if name == "dig::gla_mixer":
        return {
            "local_state_kernel": Cost(bytes=element * (keys + values + rank)),
            "output_kernel": Cost(bytes=element * (2 * keys + 3 * values)),
            # Which reads all slices; it is alone, or comes after the states of segments.
            "walk_kernel": Cost(bytes=element * (2 * keys + 3 * values + rank)),
            "segment_state_kernel": Cost(bytes=element * (keys + values + rank)),
        }
    states, sums = (math.prod(shape) * ITEM_BYTES.get(of, 2) for shape, of in zip(shapes[4:6], types[4:6], strict=True))
    # q, k, v, g and dy; do, dg and the output again; states and their gradients.
    outputs = Cost(bytes=element * (2 * keys + 6 * values) + 2 * states + sums)
    # q, k, v and do; the gradients of q, k, v and of the decays.
    gradients = Cost(bytes=element * (5 * keys + 3 * values) + 2 * states + sums)
    return {
        "output_backward_kernel": outputs,
        "output_backward_parts_kernel": outputs,
        "gradient_kernel": gradients,
        "gradient_rounds_kernel": gradients,
        "scan_kernel": Cost(bytes=2 * states),
    }
