"""Arithmetic that several operations' kernels share, in fewer instructions than the compiler takes for it."""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def widen(row, PACKED: tl.constexpr):
    """A tuple of tensors in fp32. PACKED is for bf16 on a GPU: two values in two instructions instead of three."""
    wide = ()
    for i in tl.static_range(len(row)):
        if PACKED:
            value = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [row[i]],
                dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = row[i].to(tl.float32)
        wide += (value,)
    return wide


@triton.jit
def reciprocal(x, PRECISION: tl.constexpr):
    """1 / x for x >= 1 to one unit in the last place; a full division takes five times the instructions."""
    if PRECISION == "interpreter":
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, PRECISION: tl.constexpr):
    """1 / (1 + e^-x), any shape, fp32."""
    # The constant stands on the right: on its left Triton's interpreter makes the product a constexpr, not a tensor.
    return reciprocal(1.0 + tl.exp2(x * -LOG2E), PRECISION)


INTERPRETED = not isinstance(sigmoid, triton.runtime.JITFunction)
"""Whether kernels run in Triton's interpreter, which knows no PTX."""
