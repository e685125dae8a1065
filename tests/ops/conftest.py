"""Triton's interpreter, where `tests/conftest.py` has chosen it, made to round as the hardware does."""

from __future__ import annotations

import os

import torch


def _round_bf16_to_nearest() -> None:
    """Make the interpreter round fp32 to bf16 as the GPU does, to nearest even; it cuts the low bits off instead.

    Without this, errors in bf16 would be two to three times those of the hardware, all towards zero.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_rounding


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_bf16_to_nearest()
